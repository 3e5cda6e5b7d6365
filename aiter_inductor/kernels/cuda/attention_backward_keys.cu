// Gradients of keys and values of flash attention for sm_90, bf16 or fp16, for wide heads, whose
// sums of both do not find room beside each other in the registers of one warpgroup.
//
// A block owns 64 keys of one head and walks over the queries that see them, 64 at a time, of all
// heads that share these keys. One warpgroup makes dV: scores, transposed, a row a key, whose
// probabilities, in registers, are the left operand of dV += P^T dO. It leaves them in shared memory
// for the other one, which makes dK: the gradients of the probabilities, dP^T = V dO^T, and with
// both those of the scores, the left operand of dK += dS^T Q. Each multiplies half of the work.
//
// Columns of keys and values that find room stay in registers as left operands, which halves what
// their products read of shared memory.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), K_KEPT and
// V_KEPT (columns of 64 of them that stay in registers), Q_STAGES and DO_STAGES (blocks of queries,
// and of output gradients, in flight), CAUSAL, WINDOW, FIRST_KEYS, SOFTCAP, PACKED and FP16 (0 or
// 1), and SHARED_BYTES (what the launch asks for).

#include "ring.h"

constexpr int KEYS = 64, QUERIES = 64;
#include "attention_backward_walk.h"
#include "attention_products.h"
#include "attention_rows.h"

// A head is cut into columns of 64 elements: 128 bytes a row, what one swizzled box may hold.
constexpr int QK_COLUMNS = QK_DIM / 64, V_COLUMNS = V_DIM / 64;
constexpr u32 COLUMN_BYTES = 64 * 128;
constexpr u32 Q_BYTES = QK_COLUMNS * COLUMN_BYTES, DO_BYTES = V_COLUMNS * COLUMN_BYTES;
constexpr u32 ROW_BYTES = QUERIES * 4;  // one number a query
// Probabilities of bf16 heads are handed over in fp16, whose error is an eighth of what rounding
// their gradients to bf16 adds, 2^14 times as large, so that none of up to 2^28 keys falls below its
// normal numbers; sums are made of those and scaled back. Those of fp16 heads take fp32.
constexpr float SHIFT = FP16 ? 0.f : 14.f, UNSHIFT = FP16 ? 1.f : 1.f / 16384;
constexpr int UNIT = FP16 ? 4 : 8;         // of them in 16 bytes
constexpr int UNITS = QUERIES / 2 / UNIT;  // of a thread
constexpr u32 P_BYTES = UNITS * WARPGROUP * 16;

constexpr u32 V_AT = (QK_COLUMNS - K_KEPT) * COLUMN_BYTES;
constexpr u32 Q_AT = V_AT + (V_COLUMNS - V_KEPT) * COLUMN_BYTES;
constexpr u32 DO_AT = Q_AT + Q_STAGES * Q_BYTES;
constexpr u32 P_AT = DO_AT + DO_STAGES * DO_BYTES;
constexpr u32 LSE_AT = P_AT + 2 * P_BYTES;
constexpr u32 DELTA_AT = LSE_AT + Q_STAGES * ROW_BYTES;
constexpr u32 BARRIERS_AT = DELTA_AT + DO_STAGES * ROW_BYTES;

constexpr u32 READERS = 8;  // warps that multiply
using KeyRing = Ring<1, READERS>;
using QRing = Ring<Q_STAGES, READERS>;
using DoRing = Ring<DO_STAGES, READERS>;
constexpr u32 Q_BARRIERS_AT = BARRIERS_AT + KeyRing::BYTES;
constexpr u32 DO_BARRIERS_AT = Q_BARRIERS_AT + QRing::BYTES;
static_assert(1024 + DO_BARRIERS_AT + DoRing::BYTES == SHARED_BYTES,
              "attention_backward_wide_config.py counts otherwise");

// Named barriers: the probabilities of an even or odd step are there, and have been read.
constexpr u32 SHARED_BARRIER = 1, READ_BARRIER = 3;

// ---- the warp that copies

struct Copier {
  u32 base;
  const TensorMap &q_map, &k_map, &v_map, &do_map;
  const float *lse, *delta;
  QRing q_ring;
  DoRing do_ring;

  __device__ void columns(u32 to, const TensorMap& map, u32 full, int first, int end, int row,
                          const Item& item) {
    for (int column = first; column < end; column++)
      tma_load_4d(to + (column - first) * COLUMN_BYTES, map, full, 64 * column, row, item.kv_head,
                  item.batch);
  }
  // Those that stay in shared memory, and the others as the first items of the rings.
  __device__ void keys(const Item& item) {
    const u32 full = KeyRing(base + BARRIERS_AT).full();
    const int row = item.first_key + item.key;
    barrier_expect(full, Q_AT);
    columns(base, k_map, full, 0, QK_COLUMNS - K_KEPT, row, item);
    columns(base + V_AT, v_map, full, 0, V_COLUMNS - V_KEPT, row, item);
    barrier_expect(q_ring.full(), K_KEPT * COLUMN_BYTES);
    columns(base + Q_AT, k_map, q_ring.full(), QK_COLUMNS - K_KEPT, QK_COLUMNS, row, item);
    q_ring.next();
    barrier_expect(do_ring.full(), V_KEPT * COLUMN_BYTES);
    columns(base + DO_AT, v_map, do_ring.full(), V_COLUMNS - V_KEPT, V_COLUMNS, row, item);
    do_ring.next();
  }
  // A block of queries or of output gradients, and one number for each of them.
  template <int COLUMNS, class AnyRing>
  __device__ void rows(AnyRing& ring, u32 at, const TensorMap& map, u32 numbers_at,
                       const float* numbers, const Item& item, const Walk& walk) {
    ring.wait_empty();
    barrier_expect(ring.full(), COLUMNS * COLUMN_BYTES + ROW_BYTES);
    at += base + ring.place * COLUMNS * COLUMN_BYTES;
    const int row = item.first_query + walk.block * QUERIES;
    UNROLL for (int column = 0; column < COLUMNS; column++)
      tma_load_4d(at + column * COLUMN_BYTES, map, ring.full(), 64 * column, row, walk.head,
                  item.batch);
    bulk_load(base + numbers_at + ring.place * ROW_BYTES, numbers + (i64)walk.chunk * QUERIES,
              ROW_BYTES, ring.full());
    ring.next();
  }
  __device__ void run(const Problem& problem, const Item& item) {
    Walk walk(problem, item);
    if (walk.count() == 0) return;
    keys(item);
#pragma unroll 1
    for (int left = walk.count(); left > 0; left--, walk.next()) {
      rows<QK_COLUMNS>(q_ring, Q_AT, q_map, LSE_AT, lse, item, walk);
      rows<V_COLUMNS>(do_ring, DO_AT, do_map, DELTA_AT, delta, item, walk);
    }
  }
};

// ---- the warpgroups that multiply

struct Scales {
  float scale;  // on the scores, or on tanh of them where they are capped, times log2(e)
  float cap;    // as tanh_approx takes them
};

// OF_VALUES makes dV out of pairs of keys and queries, the other dK out of pairs of values and
// output gradients.
template <bool OF_VALUES> struct Multiplier {
  static constexpr int KEPT = OF_VALUES ? K_KEPT : V_KEPT;
  static constexpr int COLUMNS = OF_VALUES ? QK_COLUMNS : V_COLUMNS, HELD = COLUMNS - KEPT;
  static constexpr int SUM_COLUMNS = OF_VALUES ? V_COLUMNS : QK_COLUMNS, WIDTH = 64 * SUM_COLUMNS;
  static constexpr u32 OWN_AT = OF_VALUES ? 0 : V_AT;
  static constexpr u32 PAIR_AT = OF_VALUES ? Q_AT : DO_AT, SUM_AT = OF_VALUES ? DO_AT : Q_AT;
  static constexpr u32 NUMBERS_AT = OF_VALUES ? LSE_AT : DELTA_AT;
  static constexpr u32 PAIR_RING_AT = OF_VALUES ? Q_BARRIERS_AT : DO_BARRIERS_AT;
  static constexpr u32 SUM_RING_AT = OF_VALUES ? DO_BARRIERS_AT : Q_BARRIERS_AT;
  using PairRing = Ring<OF_VALUES ? Q_STAGES : DO_STAGES, READERS>;
  using SumRing = Ring<OF_VALUES ? DO_STAGES : Q_STAGES, READERS>;

  u32 base;
  Scales scales;
  Walk walk;
  PairRing pairs;
  SumRing sums;
  u32 step = 0;                   // blocks of queries that have been weighed
  u32 own[KEPT ? 16 * KEPT : 1];  // columns of keys or values
  float s[QUERIES / 2];           // pairs, a row a key; probabilities or gradients of scores
  u32 p[QUERIES / 4];             // the same in 16 bits
  float sum[WIDTH / 2];

  __device__ Multiplier(u32 base, const Scales& scales, const Walk& walk)
      : base(base), scales(scales), walk(walk), pairs(base + PAIR_RING_AT),
        sums(base + SUM_RING_AT) {
    UNROLL for (float& x : sum) x = 0.f;
  }

  // The rings' first places are released once the first product has used these registers: an
  // arrival does not wait for loads under way, and the next copy could overtake them.
  __device__ void load_own() {
    KeyRing(base + BARRIERS_AT).wait_full();
    pairs.wait_full();
    const u32 lane = threadIdx.x % WARP, row = threadIdx.x % WARPGROUP / WARP * 16 + lane % 16;
    UNROLL for (int i = 0; i < 4 * KEPT; i++) {
      u32 x[4];
      ldmatrix_x4(x, base + PAIR_AT + i / 4 * COLUMN_BYTES +
                         swizzle_128(row, i % 4 * 2 + lane / 16));
      UNROLL for (int j = 0; j < 4; j++) own[4 * i + j] = x[j];
    }
    pairs.next();
    sums.next();
  }
  __device__ void release_own() const {
    release(PairRing(pairs.barriers).empty());
    release(SumRing(sums.barriers).empty());
  }
  __device__ void start_pairs() {
    u32 own_keys = base + OWN_AT;
    opaque(own_keys);
    const u64 a = k_major_descriptor(own_keys);
    const u64 b = k_major_descriptor(base + PAIR_AT + pairs.place * COLUMNS * COLUMN_BYTES);
    keep(s);
    wgmma_fence();
    UNROLL for (int i = 0; i < 4 * COLUMNS; i++) {
      const u32 at = (i / 4 * COLUMN_BYTES + i % 4 * 32) / 16;
      if (i < 4 * HELD) {
        multiply<QUERIES, false, false>(s, a + at, b + at, i > 0);
      } else {
        const u32* x = own + 4 * (i - 4 * HELD);
        const u32 kept[4] = {x[0], x[1], x[2], x[3]};
        multiply<QUERIES, false>(s, kept, b + at, i > 0);
      }
    }
    wgmma_commit();
  }
  __device__ void start_sum() {
    u32 rows = base + SUM_AT + sums.place * SUM_COLUMNS * COLUMN_BYTES;
    opaque(rows);
    const u64 b = mn_major_descriptor(rows, COLUMN_BYTES);
    keep(sum);
    wgmma_fence();
    UNROLL for (int i = 0; i < QUERIES / 16; i++) {
      const u32 a[4] = {p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
      multiply<WIDTH, true>(sum, a, b + i * 2048 / 16, true);
    }
    wgmma_commit();
  }

  __device__ void hide() {
    const int window = walk.problem.window, query = walk.block * QUERIES;
    bool hides = KEYS > walk.num_keys;
    if (CAUSAL) hides |= walk.seer + KEYS - 1 > query;
    if (WINDOW) hides |= walk.seer + window <= query + QUERIES - 1;
    if (FIRST_KEYS) hides |= walk.first_key(query + QUERIES - 1) > 0;
    if (!hides) return;
    const int lane = threadIdx.x % WARP;
    const int key = threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
    const int seer = walk.seer + key - query - 2 * (lane % 4);
    UNROLL for (int i = 0; i < QUERIES / 2; i++) {
      const int column = 8 * (i / 4) + i % 2, h = i % 4 / 2;
      bool hidden = key + 8 * h >= walk.num_keys;
      if (CAUSAL) hidden |= seer + 8 * h > column;
      if (WINDOW) hidden |= seer + 8 * h + window <= column;
      if (FIRST_KEYS) hidden |= walk.first_key(query + 2 * (lane % 4) + column) > key + 8 * h;
      if (hidden) s[i] = -INF;
    }
  }
  // Where 16 bytes of this thread lie: the other warpgroup's has the same rows and columns.
  __device__ u32 handed(int unit) const {
    return base + P_AT + step % 2 * P_BYTES + unit * WARPGROUP * 16 + threadIdx.x % WARPGROUP * 16;
  }
  __device__ void hand_over(int unit, const float (&x)[UNIT]) const {
    u32 y[4];
    UNROLL for (int i = 0; i < 4; i++)
      y[i] = FP16 ? __float_as_uint(x[i]) : pack_fp16(x[2 * i % UNIT], x[(2 * i + 1) % UNIT]);
    store_four(handed(unit), y);
  }
  __device__ void receive(int unit, float (&x)[UNIT]) const {
    u32 y[4];
    load_four(y, handed(unit));
    UNROLL for (int i = 0; i < UNIT; i++) {
      const float2 pair = unpack_fp16(y[i / 2]);
      x[i] = FP16 ? __uint_as_float(y[i % 4]) : i % 2 ? pair.y : pair.x;
    }
  }

  // Scores to probabilities, which are handed over times what a cap leaves of a score's gradient.
  __device__ void probabilities(u32 lse) {
    hide();
    if (step >= 2) named_sync(READ_BARRIER + step % 2, 2 * WARPGROUP);
    UNROLL for (int unit = 0; unit < UNITS; unit++) {
      float over[UNIT];
      float2 of;
      UNROLL for (int i = 0; i < UNIT; i++) {
        if (i % 4 == 0) {
          of = load_pair(lse + (unit * UNIT + i) / 4 * 32);
          of.x -= SHIFT, of.y -= SHIFT;
        }
        float& x = s[unit * UNIT + i];
        float slope = 1.f;
        if (SOFTCAP) {
          const float capped = tanh_approx(x * scales.cap);
          slope = 1.f - capped * capped;
          x = x == -INF ? -INF : capped;
        }
        x = exp2_approx(fmaf(x, scales.scale, i % 2 ? -of.y : -of.x));
        over[i] = x * slope;
      }
      hand_over(unit, over);
    }
    named_arrive(SHARED_BARRIER + step % 2, 2 * WARPGROUP);
  }
  // Gradients of the probabilities to gradients of the scores.
  __device__ void gradients(u32 delta, bool more) {
    named_sync(SHARED_BARRIER + step % 2, 2 * WARPGROUP);
    UNROLL for (int unit = 0; unit < UNITS; unit++) {
      float received[UNIT];
      receive(unit, received);
      float2 of;
      UNROLL for (int i = 0; i < UNIT; i++) {
        if (i % 4 == 0) of = load_pair(delta + (unit * UNIT + i) / 4 * 32);
        float& x = s[unit * UNIT + i];
        x = received[i] * (x - (i % 2 ? of.y : of.x));
      }
    }
    if (more) named_arrive(READ_BARRIER + step % 2, 2 * WARPGROUP);
  }
  // `left`: blocks of queries after this one.
  __device__ void weigh(int left) {
    keep(s);
    const u32 numbers = base + NUMBERS_AT + pairs.place * ROW_BYTES + threadIdx.x % 4 * 8;
    if constexpr (OF_VALUES)
      probabilities(numbers);
    else
      gradients(numbers, left >= 2);
    keep(s);
    release(pairs.empty());
    pairs.next();
    step++;
  }
  __device__ void round() {
    UNROLL for (int i = 0; i < QUERIES / 4; i++) p[i] = pack_16(s[2 * i], s[2 * i + 1]);
  }

  // Rows of the next packed sequence, which must not be seen even as 0 times NaN. Both warpgroups
  // write these zeros for themselves, before they read.
  template <int COUNT> __device__ void clear_other_queries(u32 rows, int block) {
    const int kept = walk.num_queries - block * QUERIES;
    if (PACKED && kept < QUERIES) {
      clear_rows<QUERIES, COUNT>(base + rows, kept, QUERIES);
      fence_shared();
      named_sync(5 + OF_VALUES, WARPGROUP);
    }
  }
  __device__ void wait_pairs() {
    pairs.wait_full();
    clear_other_queries<COLUMNS>(PAIR_AT + pairs.place * COLUMNS * COLUMN_BYTES, walk.block);
  }
  __device__ void wait_sum(int block) {
    sums.wait_full();
    clear_other_queries<SUM_COLUMNS>(SUM_AT + sums.place * SUM_COLUMNS * COLUMN_BYTES, block);
  }

  // The next pairs are weighed while the sum is multiplied.
  __device__ void run() {
    int left = walk.count();
    if (left == 0) return;
    load_own();
    wait_pairs();
    start_pairs();
    wgmma_wait<0>();
    release_own();
    weigh(--left);
    round();
#pragma unroll 1
    while (left > 0) {
      const int block = walk.block;
      walk.next();
      wait_pairs();
      start_pairs();
      wait_sum(block);
      start_sum();
      wgmma_wait<1>();
      weigh(--left);
      wgmma_wait<0>();
      release(sums.empty());
      sums.next();
      round();
    }
    wait_sum(walk.block);
    start_sum();
    wgmma_wait<0>();
    keep(sum);
  }
};

// Where rows of results go; strides in elements.
struct Rows {
  u16* to;
  i64 batch, head, row;
  int width;
  float factor;
};

template <bool OF_VALUES>
DEVICE void make(u32 base, const Scales& scales, const Problem& problem, int index,
                 const Rows& rows) {
  Multiplier<OF_VALUES> multiplier(base, scales, Walk(problem, item_at(problem, index)));
  multiplier.run();
  const Item item = item_at(problem, index);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
  const int key = item.key + 16 * warp + lane / 4;
  const float scale = rows.factor * UNSHIFT, factor[2] = {scale, scale};
  u16* to = rows.to + item.batch * rows.batch + item.kv_head * rows.head +
            (i64)(item.first_key + key) * rows.row;
  write_rows(multiplier.sum, factor, to, rows.row, item.num_keys - key, rows.width);
}

// Asked for again, the item is computed again: kept over the walk, its numbers would spill.
DEVICE int item_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)
    attention_backward_keys(const __grid_constant__ TensorMap q_map,
                            const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map,
                            const __grid_constant__ TensorMap do_map, const float* lse,
                            const float* delta, u16* dk, u16* dv, const int* q_starts,
                            const int* k_starts, const int* first_keys, int num_heads,
                            int heads_per_kv, int all_kv_heads, int num_queries, int num_keys,
                            int shift, int window, int key_blocks, int query_blocks,
                            int together, int num_sequences, int from_end, int qk_dim, int v_dim,
                            float scale, float scale_log2, float cap_scale,
                            i64 dk_batch, i64 dk_head, i64 dk_row, i64 dv_batch, i64 dv_head,
                            i64 dv_row) {
  extern __shared__ u8 storage[];
  const u32 base = (shared_address(storage) + 1023) & ~1023u;
  const Problem problem{num_heads,    heads_per_kv, num_heads / heads_per_kv,
                        all_kv_heads, num_queries,  num_keys,
                        shift,        window,       key_blocks,
                        query_blocks, together,     q_starts,
                        k_starts,     num_sequences, from_end,
                        first_keys};
  const QRing q_ring(base + Q_BARRIERS_AT);
  const DoRing do_ring(base + DO_BARRIERS_AT);
  if (threadIdx.x == 0) {
    KeyRing(base + BARRIERS_AT).init();
    q_ring.init();
    do_ring.init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    drop_registers<24>();
    if (threadIdx.x == 0) {
      Copier copier{base, q_map, k_map, v_map, do_map, lse, delta, q_ring, do_ring};
      copier.run(problem, item_at(problem, item_index()));
    }
  } else {
    raise_registers<240>();
    const Scales scales{scale_log2, cap_scale};
    // The same in all lanes, and known to be to the compiler.
    if (__shfl_sync(~0u, (int)threadIdx.x / (int)WARPGROUP, 0) == 1)
      make<true>(base, scales, problem, item_index(), {dv, dv_batch, dv_head, dv_row, v_dim, 1.f});
    else
      make<false>(base, scales, problem, item_index(),
                  {dk, dk_batch, dk_head, dk_row, qk_dim, scale});
  }
}
