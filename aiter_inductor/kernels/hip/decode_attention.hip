// Attention of one token a sequence over cached keys and values, the tokens split among waves.
//
// Defined by the build, see decode_attention.py, beside what decode_ranges.h needs: Q and CACHE
// (types), D, DV (elements of a key and of a value), GROUP (query heads that share a head of keys),
// HEAD_BLOCKS (of COLUMNS of these, a wave), PAGE (tokens of a page), PACKED (layout), VALUE_VEC
// (elements of a value that a lane takes at once in the paged layout), STAGES (tiles of a wave that
// are under way), BLOCK_WAVES, SOFTCAP, MASK (type of a mask's elements, where MASKED).
#include "decode_tile.h"

constexpr int HEADS = HEAD_BLOCKS * COLUMNS, UNITS = (GROUP + HEADS - 1) / HEADS;
constexpr int RUN = SPREAD ? WORD : 4;  // elements of a query that a lane holds side by side

struct Larger {
  static constexpr Reduction KIND = Reduction::other;
  SIMT_DEVICE u32 of(u32 a, u32 b) { return bits_of(larger(float_of(a), float_of(b))); }
};

// The query heads of a wave, as operands B: column g of lane (g, j) holds the elements of one head
// that the lane holds of a key.
struct Queries {
  u32 operands[HEAD_BLOCKS][KEY_ROUNDS * KEY_STEPS][2];
  float scales[HEAD_BLOCKS][OWN];  // of the columns that this lane holds of a result
};

// bf16 has a wider range than fp16: heads of queries are multiplied by a power of two that brings
// their largest element to 128 or a little more.
template <int N> SIMT_DEVICE float fit_fp16(float (&x)[N]) {
  u32 most = 0;
  UNROLL for (int i = 0; i < N; i++) most = Largest::of(most, magnitude(x[i]));
  most = over_quarters<Largest>(most) >> 23;
  const u32 exponent = most == 255 || most < 8 ? 127 : 261 - most;
  UNROLL for (int i = 0; i < N; i++) x[i] *= float_of(exponent << 23);
  return float_of((254 - exponent) << 23);
}

SIMT_DEVICE void load_queries(const Q* q, i64 head_stride, int first_head, float scale,
                              Queries& queries) {
  UNROLL for (int block = 0; block < HEAD_BLOCKS; block++) {
    const int head = first_head + block * COLUMNS + lane_group();
    float x[KEY_ROUNDS * KEY_STEPS * 4];
    UNROLL for (int i = 0; i < KEY_ROUNDS * KEY_STEPS * 4; i += RUN) {
      const int d = 4 * PACK * (i / PACK) + held(i % PACK, lane_quarter());
      float run[RUN] = {};
      if (head < GROUP && d < D) load(q + (head * head_stride + d), run);
      UNROLL for (int e = 0; e < RUN; e++) x[i + e] = run[e];
    }
    float undo = 1.0f;
    if constexpr (same<Q, bf16> && same<OPERAND, fp16>) undo = fit_fp16(x);
    UNROLL for (int i = 0; i < KEY_ROUNDS * KEY_STEPS; i++)
      UNROLL for (int pair = 0; pair < 2; pair++)
        queries.operands[block][i][pair] =
            encode_pair<OPERAND>(x[4 * i + 2 * pair], x[4 * i + 2 * pair + 1]);
    UNROLL for (int i = 0; i < OWN; i++)
      queries.scales[block][i] = scale * float_of(shuffle(bits_of(undo), lane_at(column(i), 0)));
  }
}

// What a wave has found for its heads: in `sums` the elements of results that rows of V^T P^T are.
struct Found {
  float sums[HEAD_BLOCKS][VALUE_BLOCKS][4];
  float peaks[HEAD_BLOCKS][OWN], totals[HEAD_BLOCKS][OWN];
};

SIMT_DEVICE void clear(Found& found) {
  UNROLL for (int block = 0; block < HEAD_BLOCKS; block++) {
    UNROLL for (int i = 0; i < VALUE_BLOCKS; i++)
      UNROLL for (int r = 0; r < 4; r++) found.sums[block][i][r] = 0.0f;
    UNROLL for (int i = 0; i < OWN; i++) found.peaks[block][i] = -INFINITE;
    UNROLL for (int i = 0; i < OWN; i++) found.totals[block][i] = 0.0f;
  }
}

SIMT_DEVICE float capped(float score, float softcap) {  // in units of log2
  if constexpr (!SOFTCAP) return score * LOG2_E;
  const float twice = power_of_two(score * (2.0f * LOG2_E / softcap));
  return softcap * LOG2_E * (1.0f - 2.0f / (1.0f + twice));
}

typedef float Scores[TILE_BLOCKS][HEAD_BLOCKS][4];

// Scores in units of log2; of tokens that are not seen, -inf.
SIMT_DEVICE void score(const Tiles& tiles, int stage, const Queries& queries,
                       const Seen& seen, const Biases& biases, float softcap, Scores& scores) {
  UNROLL for (int s = 0; s < TILE_BLOCKS; s++) {
    UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
      UNROLL for (int r = 0; r < 4; r++) scores[s][block][r] = 0.0f;
    UNROLL for (int i = 0; i < KEY_ROUNDS; i++) {
      Chunk<16> keys[ROWS];
      UNROLL for (int h = 0; h < ROWS; h++) keys[h] = key_chunk(tiles, stage, s, h, i);
      UNROLL for (int step = 0; step < KEY_STEPS; step++) {
        u32 a[ROWS][2];
        UNROLL for (int h = 0; h < ROWS; h++) four_elements(keys[h], step, a[h]);
        UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
          multiply<OPERAND>(scores[s][block], a, queries.operands[block][i * KEY_STEPS + step]);
      }
    }
    UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
      UNROLL for (int r = 0; r < 4; r++) {
        const float x = scores[s][block][r] * queries.scales[block][r % OWN];
        scores[s][block][r] = capped(x, softcap);
      }
  }
  if constexpr (MASKED)
    UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
      UNROLL for (int r = 0; r < 4; r++) {
        const int row = c_row(r);
        const int place = place_in_tile(s, quarter_of(row), place_of(row));
        const float bias = float_of(from_place(biases.of, place));
        UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
          scores[s][block][r] = bias == -INFINITE ? bias : scores[s][block][r] + bias;
      }
  if (seen.all) return;
  UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
    UNROLL for (int r = 0; r < 4; r++) {
      const int row = c_row(r), place = place_in_tile(s, quarter_of(row), place_of(row));
      const bool inside = place >= seen.first && place < seen.end;
      UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
        if (!inside) scores[s][block][r] = -INFINITE;
    }
}

// Scores become weights; what was found before is brought to the new largest scores.
SIMT_DEVICE void weigh(Scores& scores, Found& found) {
  UNROLL for (int block = 0; block < HEAD_BLOCKS; block++) {
    float decay[OWN], base[OWN];
    UNROLL for (int i = 0; i < OWN; i++) {
      float peak = -INFINITE;
      UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
        UNROLL for (int r = i; r < 4; r += OWN) peak = larger(peak, scores[s][block][r]);
      peak = larger(float_of(over_rows<Larger>(bits_of(peak))), found.peaks[block][i]);
      base[i] = peak == -INFINITE ? 0.0f : peak;
      decay[i] = power_of_two(found.peaks[block][i] - base[i]);
      found.peaks[block][i] = peak;
      found.totals[block][i] *= decay[i];
    }
    UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
      UNROLL for (int r = 0; r < 4; r++) {
        const float weight = power_of_two(scores[s][block][r] - base[r % OWN]);
        scores[s][block][r] = weight;
        found.totals[block][r % OWN] += weight;
      }
    if (in_any_lane(decay[0] != 1.0f || decay[OWN - 1] != 1.0f))
      UNROLL for (int i = 0; i < VALUE_BLOCKS; i++)
        UNROLL for (int r = 0; r < 4; r++) found.sums[block][i][r] *= decay[r % OWN];
  }
}

template <bool ALL>
SIMT_DEVICE void add_values(const Tiles& tiles, int stage, const Scores& weights,
                            const Seen& seen, Found& found) {
  constexpr int EACH = PACKED ? TILE_BLOCKS : 1;  // blocks of tokens that a vector is of
  UNROLL for (int first = 0; first < TILE_BLOCKS; first += EACH) {
    u32 b[EACH][HEAD_BLOCKS][2];
    UNROLL for (int s = 0; s < EACH; s++)
      UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
        transposed<OPERAND>(weights[first + s][block], b[s][block]);
    UNROLL for (int i = 0; i < VALUE_ROUNDS; i++) {
      Values values;
      load_values<ALL>(tiles, stage, first, i, seen, values);
      UNROLL for (int s = 0; s < EACH; s++)
        UNROLL for (int part = 0; part < ROUND_BLOCKS; part++) {
          u32 a[ROWS][2];
          UNROLL for (int h = 0; h < ROWS; h++)
            four_tokens(values, first + s, part * ROWS + h, a[h]);
          UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
            multiply<OPERAND>(found.sums[block][i * ROUND_BLOCKS + part], a, b[s][block]);
        }
    }
  }
}

// Where a wave leaves what it found: of the sequence's whole result, or of a part of it.
struct Results {
  Q* out;          // [num_seqs, num_heads, DV]
  float* partial;  // of a Workspace, as lse
  float* lse;
  const Q* sinks;
  i32 num_heads, heads;
};

SIMT_DEVICE void leave(const Found& found, const Results& results, i32 first_head, i64 seq,
                       i64 part, bool whole, float value_scale) {
  UNROLL for (int block = 0; block < HEAD_BLOCKS; block++)
    UNROLL for (int own = 0; own < OWN; own++) {
      const int in_unit = block * COLUMNS + column(own);
      float total = float_of(over_rows<Sum>(bits_of(found.totals[block][own])));
      if (in_unit >= results.heads) continue;
      const int head = first_head + in_unit;
      const float peak = found.peaks[block][own];
      if (whole && results.sinks) {
        const float sink = decode<Q>(results.sinks[head].bits) * LOG2_E;
        total += power_of_two(sink - (peak == -INFINITE ? 0.0f : peak));
      }
      const float divisor = total == 0.0f ? 1.0f : total, factor = value_scale / divisor;
      const i64 row = (whole ? seq : part) * results.num_heads + head;
      if (!whole && lane_leads())
        results.lse[row] = total == 0.0f ? -INFINITE : peak + log2_of(divisor);
      UNROLL for (int i = 0; i < VALUE_BLOCKS; i++)
        UNROLL for (int r = own; r < 4; r += OWN) {
          const int dv = value_element(i, c_row(r));
          const float value = found.sums[block][i][r] * factor;
          if (dv >= DV) continue;
          if (whole)
            results.out[row * DV + dv].bits = (u16)encode_pair<Q>(value, 0.0f);
          else
            results.partial[row * DV + dv] = value;
        }
    }
}

SIMT_KERNEL(BLOCK_WAVES * WAVE)
decode_attend(const Q* q, const CACHE* keys, const CACHE* values, const i32* tables,
              const i32* lengths, const float* key_scale, const float* value_scale, const Q* sinks,
              const MASK* mask, Q* out, float* workspace, float scale, float softcap, i32 num_seqs,
              i32 longest, i32 window, i32 num_kv_heads, i32 ranges, i64 q_seq, i64 q_head,
              i64 tables_seq, i64 mask_seq, i64 mask_token, i64 key_head, i64 value_head,
              i32 key_page, i32 key_token, i32 key_chunk, i32 value_page, i32 value_token,
              i32 value_chunk) {
  begin();
  const Lengths all{lengths, num_seqs, longest, window};
  const Workspace room = Workspace::at(workspace, ranges, num_kv_heads * GROUP, DV);
  const i32 wave = uniform(block_x() * BLOCK_WAVES + thread_index() / WAVE);
  const i32 units = num_kv_heads * UNITS, unit = wave % units, range = wave / units;
  const i32 kv_head = unit / UNITS, in_group = unit % UNITS * HEADS;
  const i32 total = total_tiles(all);
  if (wave == 0 && lane() == 0) room.starts[num_seqs] = total;
  ranges = used_ranges(total, ranges);
  if (range >= ranges) return;
  const i32 first = range_begin(range, total, ranges), end = range_begin(range + 1, total, ranges);
  if (first == end) return;

  const Pages pages{(const char*)(keys + kv_head * key_head),
                    (const char*)(values + kv_head * value_head),
                    tables,
                    tables_seq,
                    (u32)key_page,
                    (u32)key_token,
                    (u32)key_chunk,
                    (u32)value_page,
                    (u32)value_token,
                    (u32)value_chunk};
  SIMT_TILES(tiles);
  begin_tiles(tiles);
  Cursor now = Cursor::at(all, first), ahead = now;
  i32 left = end - first;  // tiles still to be asked for
  PageNumbers numbers = page_numbers(pages, ahead);
  UNROLL for (int stage = 0; stage < STAGES - 1; stage++)
    ask_next(tiles, stage, pages, all, ahead, numbers, left);

  const Results results{out, room.partial, room.lse, sinks, num_kv_heads * GROUP,
                        GROUP - in_group < HEADS ? GROUP - in_group : HEADS};
  const float k_scale = key_scale ? *key_scale : 1.0f, v_scale = value_scale ? *value_scale : 1.0f;
  Queries queries;
  Found found;
  i32 piece = -1;  // the first tile of the sequence that this wave has
  int stage = 0;
  u32 parity = 0;  // of the stage's turn
  for (i32 tile = first; tile < end; tile++) {
    if (piece < 0) {
      piece = now.tile;
      load_queries(q + (now.seq * q_seq + kv_head * GROUP * q_head), q_head, in_group,
                   scale * k_scale, queries);
      clear(found);
      if (unit == 0 && now.tile == 0 && lane() == 0) room.starts[now.seq] = tile;
    }
    const Seen seen = Seen::of(now);
    const Biases biases = biases_of(mask + now.seq * mask_seq, mask_token, now, seen);
    ask_next(tiles, stage == 0 ? STAGES - 1 : stage - 1, pages, all, ahead, numbers, left);
    wait_for_tile(tiles, stage, parity);
    Scores scores;
    score(tiles, stage, queries, seen, biases, softcap, scores);
    weigh(scores, found);
    if (seen.all)
      add_values<true>(tiles, stage, scores, seen, found);
    else
      add_values<false>(tiles, stage, scores, seen, found);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
    const bool last = now.tile + 1 == now.sequence.tiles;
    if (last || tile + 1 == end) {
      const bool whole = piece == 0 && last;
      const i32 part = 2 * range + (tile - now.tile + piece > first);
      leave(found, results, kv_head * GROUP + in_group, now.seq, part, whole, v_scale);
      piece = -1;
    }
    if (tile + 1 < end) Cursor::advance(now, all);
  }
}
SIMT_ENTRY(decode_attend)
