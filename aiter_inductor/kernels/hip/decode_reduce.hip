// The parts of results that decode_attention.hip leaves, brought together: a block a head of a
// sequence. Whole results are there already.
//
// Defined by the build, see decode_attention.py: Q (type), DV, HEADS (of queries), BLOCK_WAVES, and
// what decode_ranges.h needs.
#include "decode_ranges.h"

constexpr int EACH = (DV + WAVE - 1) / WAVE;
constexpr int AHEAD = 4;  // parts that a wave asks for before it adds the first

struct Sums {
  float values[EACH];
  float peak, total;
};

// Of weight 2 ** lse.
SIMT_DEVICE void add(Sums& sums, float lse, const float (&values)[EACH], float total) {
  const float peak = larger(sums.peak, lse), base = peak == -INFINITE ? 0.0f : peak;
  const float before = power_of_two(sums.peak - base), now = power_of_two(lse - base);
  UNROLL for (int i = 0; i < EACH; i++)
    sums.values[i] = sums.values[i] * before + values[i] * now;
  sums.total = sums.total * before + total * now;
  sums.peak = peak;
}

SIMT_DEVICE void store_row(Q* out, const float (&values)[EACH], float divisor) {
  UNROLL for (int i = 0; i < EACH; i++) {
    const int dv = i * WAVE + lane();
    if (dv < DV) out[dv].bits = (u16)encode_pair<Q>(values[i] / divisor, 0.0f);
  }
}

SIMT_KERNEL(BLOCK_WAVES * WAVE)
decode_reduce(float* workspace, const i32* lengths, const Q* sinks, Q* out, i32 num_seqs,
              i32 longest, i32 window, i32 ranges) {
  begin();
  const Workspace room = Workspace::at(workspace, ranges, HEADS, DV);
  SIMT_SHARED float peaks[BLOCK_WAVES], totals[BLOCK_WAVES], others[BLOCK_WAVES][EACH * WAVE];
  const Lengths all{lengths, num_seqs, longest, window};
  const i32 seq = block_x() / HEADS, head = block_x() % HEADS;
  const int wave = uniform(thread_index() / WAVE);
  Q* row = out + ((i64)seq * HEADS + head) * DV;
  const i32 tiles = Lengths::of(all, seq).tiles;
  Sums sums{{}, -INFINITE, 0.0f};
  if (tiles == 0) {
    if (wave == 0) store_row(row, sums.values, 1.0f);
    return;
  }
  const i32 start = room.starts[seq], total = room.starts[num_seqs];
  ranges = used_ranges(total, ranges);
  const i32 first = range_of(start, total, ranges);
  const i32 last = range_of(start + tiles - 1, total, ranges);
  if (first == last) return;
  const bool later = range_begin(first, total, ranges) < start;  // than its range's first tile
  for (i32 range = first + wave; range <= last; range += AHEAD * BLOCK_WAVES) {
    float known[AHEAD], values[AHEAD][EACH];
    UNROLL for (int part = 0; part < AHEAD; part++) {
      const i32 of = range + part * BLOCK_WAVES;
      const i64 at = (i64)(2 * of + (of == first && later)) * HEADS + head;
      known[part] = of <= last ? room.lse[at] : -INFINITE;
      UNROLL for (int i = 0; i < EACH; i++) {
        const int dv = i * WAVE + lane();
        values[part][i] = of <= last && dv < DV ? room.partial[at * DV + dv] : 0.0f;
      }
    }
    UNROLL for (int part = 0; part < AHEAD; part++) add(sums, known[part], values[part], 1.0f);
  }
  if (lane() == 0) peaks[wave] = sums.peak;
  if (lane() == 0) totals[wave] = sums.total;
  UNROLL for (int i = 0; i < EACH; i++) others[wave][i * WAVE + lane()] = sums.values[i];
  barrier();
  if (wave > 0) return;
  UNROLL for (int other = 1; other < BLOCK_WAVES; other++) {
    float values[EACH];
    UNROLL for (int i = 0; i < EACH; i++) values[i] = others[other][i * WAVE + lane()];
    add(sums, peaks[other], values, totals[other]);
  }
  if (sinks) {
    const float sink = decode<Q>(sinks[head].bits) * LOG2_E;
    sums.total += power_of_two(sink - (sums.peak == -INFINITE ? 0.0f : sums.peak));
  }
  store_row(row, sums.values, sums.total == 0.0f ? 1.0f : sums.total);
}
SIMT_ENTRY(decode_reduce)
