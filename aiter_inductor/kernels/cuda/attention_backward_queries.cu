// Gradients of queries of flash attention for sm_90, bf16 or fp16, for wide heads; those of keys and
// values are attention_backward_keys.cu's.
//
// A block owns 128 queries of one head, half for each of two warpgroups, and walks over the tiles of
// keys that they see. Scores and dP = dO V^T lie in registers, a row a query; with both, the
// gradients of the scores are the left operand of dQ += dS K, during which the exponentials of the
// next scores are computed.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), BLOCK_N
// (keys of a tile, a multiple of 16), K_STAGES and V_STAGES (tiles of keys and of values in flight),
// CAUSAL, WINDOW, FIRST_KEYS, SOFTCAP, PACKED and FP16 (0 or 1), and SHARED_BYTES (what the launch
// asks for).

#include "ring.h"

constexpr int ROWS = 128;
#include "attention_items.h"
#include "attention_products.h"
#include "attention_rows.h"

// A head is cut into columns of 64 elements: 128 bytes a row, what one swizzled box may hold.
constexpr int QK_COLUMNS = QK_DIM / 64, V_COLUMNS = V_DIM / 64;
constexpr u32 ROW_COLUMN_BYTES = 64 * 128, KEY_COLUMN_BYTES = BLOCK_N * 128;
constexpr u32 Q_BYTES = QK_COLUMNS * ROW_COLUMN_BYTES, DO_BYTES = V_COLUMNS * ROW_COLUMN_BYTES;
constexpr u32 K_BYTES = QK_COLUMNS * KEY_COLUMN_BYTES, V_BYTES = V_COLUMNS * KEY_COLUMN_BYTES;
constexpr int QUERIES = 64;  // of a block in which numbers of queries are padded, and of a warpgroup

constexpr u32 DO_AT = 2 * Q_BYTES;
constexpr u32 K_AT = DO_AT + 2 * DO_BYTES;
constexpr u32 V_AT = K_AT + K_STAGES * K_BYTES;
constexpr u32 BARRIERS_AT = V_AT + V_STAGES * V_BYTES;

constexpr u32 READERS = 8;  // warps that multiply
using OwnRing = Ring<1, READERS>;
using KRing = Ring<K_STAGES, READERS>;
using VRing = Ring<V_STAGES, READERS>;
constexpr u32 K_BARRIERS_AT = BARRIERS_AT + OwnRing::BYTES;
constexpr u32 V_BARRIERS_AT = K_BARRIERS_AT + KRing::BYTES;
static_assert(1024 + V_BARRIERS_AT + VRing::BYTES == SHARED_BYTES,
              "attention_backward_wide_config.py counts otherwise");

// ---- the warp that copies

struct Copier {
  u32 base;
  const TensorMap &q_map, &k_map, &v_map, &do_map;
  KRing k_ring;
  VRing v_ring;

  // Queries and output gradients of both warpgroups.
  __device__ void own(int row, int head, int batch) {
    const u32 full = OwnRing(base + BARRIERS_AT).full();
    barrier_expect(full, K_AT);
    for (int w = 0; w < 2; w++) {
      for (int column = 0; column < QK_COLUMNS; column++)
        tma_load_4d(base + w * Q_BYTES + column * ROW_COLUMN_BYTES, q_map, full, 64 * column,
                    row + 64 * w, head, batch);
      for (int column = 0; column < V_COLUMNS; column++)
        tma_load_4d(base + DO_AT + w * DO_BYTES + column * ROW_COLUMN_BYTES, do_map, full,
                    64 * column, row + 64 * w, head, batch);
    }
  }
  template <int COLUMNS, class AnyRing>
  __device__ void tile(AnyRing& ring, u32 at, const TensorMap& map, int row, int head, int batch) {
    ring.wait_empty();
    barrier_expect(ring.full(), COLUMNS * KEY_COLUMN_BYTES);
    at += base + ring.place * COLUMNS * KEY_COLUMN_BYTES;
    UNROLL for (int column = 0; column < COLUMNS; column++)
      tma_load_4d(at + column * KEY_COLUMN_BYTES, map, ring.full(), 64 * column, row, head, batch);
    ring.next();
  }
  __device__ void run(const Problem& problem, const Item& item) {
    if (PACKED && item.rows >= item.num_queries) return;
    const int batch = item.head / problem.num_heads, head = item.head % problem.num_heads;
    const int kv_head = head / problem.heads_per_kv;
    own(item.first_query + item.rows, head, batch);
#pragma unroll 1
    for (int number = item.end - 1; number >= item.begin; number--) {
      const int row = item.first_key + number * BLOCK_N;
      tile<QK_COLUMNS>(k_ring, K_AT, k_map, row, kv_head, batch);
      tile<V_COLUMNS>(v_ring, V_AT, v_map, row, kv_head, batch);
    }
  }
};

// ---- the warpgroups that multiply

DEVICE int row_in_block() { return threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4; }

// What 64 queries may see: `position` is that of the first of them among the keys.
struct Seen {
  int position, num_keys, window;
  FirstKeys first_keys;
};

struct Multiplier {
  u32 base;
  int warpgroup;
  Seen seen;
  float scale, cap_scale;  // on the scores, or on tanh of them, times log2(e); of tanh_approx
  KRing k_ring;
  VRing v_ring;
  float lse[2], delta[2];  // of two rows: log-sum-exp in powers of two
  float s[BLOCK_N / 2];    // scores, then probabilities
  float t[BLOCK_N / 2];    // their gradients, then those of the scores
  u32 p[BLOCK_N / 4];      // the same in 16 bits
  float dq[QK_DIM / 2];

  __device__ Multiplier(u32 base, int warpgroup, const Seen& seen, float scale, float cap_scale)
      : base(base), warpgroup(warpgroup), seen(seen), scale(scale), cap_scale(cap_scale),
        k_ring(base + K_BARRIERS_AT), v_ring(base + V_BARRIERS_AT) {
    UNROLL for (float& x : dq) x = 0.f;
  }

  __device__ void load_numbers(const float* of_lse, const float* of_delta) {
    UNROLL for (int h = 0; h < 2; h++) {
      lse[h] = of_lse[row_in_block() + 8 * h];
      delta[h] = of_delta[row_in_block() + 8 * h];
    }
  }

  // d[64 queries x BLOCK_N] = rows times keys, over COLUMNS columns, contiguous in both.
  template <int COLUMNS>
  __device__ void start_pairs(float (&d)[BLOCK_N / 2], u32 rows, u32 keys) const {
    opaque(rows);
    const u64 a = k_major_descriptor(rows), b = k_major_descriptor(keys);
    keep(d);
    wgmma_fence();
    UNROLL for (int i = 0; i < 4 * COLUMNS; i++)
      multiply<BLOCK_N, false, false>(d, a + (i / 4 * ROW_COLUMN_BYTES + i % 4 * 32) / 16,
                                      b + (i / 4 * KEY_COLUMN_BYTES + i % 4 * 32) / 16, i > 0);
    wgmma_commit();
  }
  __device__ u32 keys_at(u32 place) const { return base + K_AT + place * K_BYTES; }
  __device__ void start_scores() {
    start_pairs<QK_COLUMNS>(s, base + warpgroup * Q_BYTES, keys_at(k_ring.place));
  }
  __device__ void start_dp() {
    start_pairs<V_COLUMNS>(t, base + DO_AT + warpgroup * DO_BYTES,
                           base + V_AT + v_ring.place * V_BYTES);
  }
  __device__ void start_dq(u32 place) {
    const u64 b = mn_major_descriptor(keys_at(place), KEY_COLUMN_BYTES);
    keep(dq);
    wgmma_fence();
    UNROLL for (int i = 0; i < BLOCK_N / 16; i++) {
      const u32 a[4] = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
      multiply<QK_DIM, true>(dq, a, b + i * 2048 / 16, true);
    }
    wgmma_commit();
  }

  // Rows of the next packed sequence become zeros, since 0 times NaN would be seen. Each warpgroup
  // writes them for itself, before it reads.
  template <int COLUMNS> __device__ void clear_other_keys(u32 at, int key) {
    const int kept = seen.num_keys - key;
    if (PACKED && kept < BLOCK_N) {
      clear_rows<BLOCK_N, COLUMNS>(at, max(kept, 0), BLOCK_N);
      fence_shared();
      named_sync(1 + warpgroup, WARPGROUP);
    }
  }
  __device__ void wait_keys(int key) {
    k_ring.wait_full();
    clear_other_keys<QK_COLUMNS>(keys_at(k_ring.place), key);
  }
  __device__ void wait_values(int key) {
    v_ring.wait_full();
    clear_other_keys<V_COLUMNS>(base + V_AT + v_ring.place * V_BYTES, key);
  }

  __device__ void hide(int key) {
    const int first = seen.position;
    bool hides = key + BLOCK_N > seen.num_keys;
    if (CAUSAL) hides |= key + BLOCK_N - 1 > first;
    if (WINDOW) hides |= key <= first + 63 - seen.window;
    if (FIRST_KEYS) hides |= key < seen.first_keys.last;
    if (!hides) return;
    const int lane = threadIdx.x % WARP, column = key + 2 * (lane % 4);
    const int own = first + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4 - column;
    const int keys = seen.num_keys - column;
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++) {
      const int j = 8 * (i / 4) + i % 2, h = i % 4 / 2;
      bool hidden = j >= keys;
      if (CAUSAL) hidden |= j > own + 8 * h;
      if (WINDOW) hidden |= j <= own + 8 * h - seen.window;
      if (FIRST_KEYS) hidden |= j < seen.first_keys.own[h] - column;
      if (hidden) s[i] = -INF;
    }
  }
  // Scores to probabilities, times what a cap leaves of a score's gradient.
  __device__ void probabilities(int key) {
    keep(s);
    hide(key);
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++) {
      float x = s[i], slope = 1.f;
      if (SOFTCAP) {
        const float capped = tanh_approx(x * cap_scale);
        slope = 1.f - capped * capped;
        x = x == -INF ? -INF : capped;
      }
      s[i] = exp2_approx(fmaf(x, scale, -lse[i % 4 / 2])) * slope;
    }
    keep(s);
  }
  __device__ void gradients() {
    keep(t);
    release(v_ring.empty());
    v_ring.next();
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++) t[i] = s[i] * (t[i] - delta[i % 4 / 2]);
    UNROLL for (int i = 0; i < BLOCK_N / 4; i++) p[i] = pack_16(t[2 * i], t[2 * i + 1]);
  }

  __device__ void run(int begin, int end) {
    OwnRing(base + BARRIERS_AT).wait_full();
    int key = (end - 1) * BLOCK_N;
    wait_keys(key);
    start_scores();
    wait_values(key);
    start_dp();
    wgmma_wait<1>();
    probabilities(key);
    wgmma_wait<0>();
    gradients();
#pragma unroll 1
    for (int left = end - begin; left > 1; left--) {
      key -= BLOCK_N;
      const u32 last = k_ring.place, last_empty = k_ring.empty();
      k_ring.next();
      wait_keys(key);
      start_scores();
      start_dq(last);
      wgmma_wait<1>();
      probabilities(key);
      // To start dP before dQ has ended is slower: 698 us against 617 for 2x4096 tokens of 16 heads
      // of 256 on an H100.
      wgmma_wait<0>();
      release(last_empty);
      wait_values(key);
      start_dp();
      wgmma_wait<0>();
      gradients();
    }
    start_dq(k_ring.place);
    wgmma_wait<0>();
    keep(dq);
  }
};

// Asked for again, the item is computed again: kept over the walk, its numbers would spill.
DEVICE int item_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// Where rows of results go; strides in elements.
struct Rows {
  u16* to;
  i64 batch, head, row;
  int width;
  float factor;
};

struct Numbers {
  const float *lse, *delta;
  int blocks;  // of QUERIES a head
};

DEVICE int first_row(const Item& item, int warpgroup) {
  return item.rows + 64 * warpgroup;
}

DEVICE void make(u32 base, int warpgroup, const Problem& problem, const Numbers& numbers,
                 float scale_log2, float cap_scale, const Rows& rows) {
  Item item = item_at(problem, item_index());
  if (PACKED && item.rows >= item.num_queries) return;
  const int first = first_row(item, warpgroup);
  Seen seen{first + problem.shift_of(item), item.num_keys, problem.window};
  seen.first_keys.read(problem, item, first, first + row_in_block());
  Multiplier multiplier(base, warpgroup, seen, scale_log2, cap_scale);
  const int first_block = PACKED ? item.first_query / QUERIES + item.sequence : 0;
  // Rows beyond the last block are not there: the numbers of its own are as good for them.
  const int in_sequence = min(first, item.num_queries - 1) / QUERIES;
  const i64 at = ((i64)item.head * numbers.blocks + first_block + in_sequence) * QUERIES;
  multiplier.load_numbers(numbers.lse + at, numbers.delta + at);
  multiplier.run(item.begin, item.end);
  item = item_at(problem, item_index());
  const int batch = item.head / problem.num_heads, head = item.head % problem.num_heads;
  const int row = first_row(item, warpgroup) + row_in_block();
  const float factor[2] = {rows.factor, rows.factor};
  u16* to = rows.to + batch * rows.batch + head * rows.head +
            (i64)(item.first_query + row) * rows.row;
  write_rows(multiplier.dq, factor, to, rows.row, item.num_queries - row, rows.width);
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)
    attention_backward_queries(const __grid_constant__ TensorMap q_map,
                               const __grid_constant__ TensorMap k_map,
                               const __grid_constant__ TensorMap v_map,
                               const __grid_constant__ TensorMap do_map, const float* lse,
                               const float* delta, u16* dq, const int* q_starts,
                               const int* k_starts, const int* first_keys, int num_heads,
                               int heads_per_kv, int all_heads, int num_queries, int num_keys,
                               int shift, int window, int row_blocks, int query_blocks, int heads_together,
                               int num_sequences, int from_end, int qk_dim, float scale,
                               float scale_log2, float cap_scale, i64 batch_stride,
                               i64 head_stride, i64 row_stride) {
  extern __shared__ u8 storage[];
  const u32 base = (shared_address(storage) + 1023) & ~1023u;
  const Problem problem{num_heads,  heads_per_kv,  all_heads,  num_queries,    num_keys,
                        shift,      window,        row_blocks, heads_together, q_starts,
                        k_starts,   num_sequences, from_end,   first_keys};
  const KRing k_ring(base + K_BARRIERS_AT);
  const VRing v_ring(base + V_BARRIERS_AT);
  if (threadIdx.x == 0) {
    OwnRing(base + BARRIERS_AT).init();
    k_ring.init();
    v_ring.init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    drop_registers<24>();
    if (threadIdx.x == 0)
      Copier{base, q_map, k_map, v_map, do_map, k_ring, v_ring}.run(
          problem, item_at(problem, item_index()));
  } else {
    raise_registers<240>();
    // The same in all lanes, and known to be to the compiler.
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / (int)WARPGROUP - 1, 0);
    make(base, warpgroup, problem, {lse, delta, query_blocks}, scale_log2, cap_scale,
         {dq, batch_stride, head_stride, row_stride, qk_dim, scale});
  }
}
