// Gradients of flash attention for sm_90, bf16 or fp16.
//
// A block owns 128 keys of one head, half for each of two warpgroups, and walks over the queries
// that see them, 64 at a time, of all heads that share these keys. Scores are kept transposed, a
// row a key, so that the probabilities, in registers, are the left operand of dV += P^T dO. Their
// gradients go through shared memory, for dK += dS^T Q and for dQ = dS K, whose parts are added up
// in fp32 in global memory. One warp copies by TMA. Layouts are in attention_backward_work.h.
//
// Heads whose sums of dK and dV do not fit the registers are attention_backward_keys.cu's and
// attention_backward_queries.cu's.

#include "attention_backward_work.h"
#include "attention_products.h"
#include "attention_rows.h"

// ---- the warp that copies

struct Copier {
  u32 base;
  const TensorMap &q_map, &k_map, &v_map, &do_map;
  const float *lse, *delta;

  __device__ void keys(const Item& item) {
    const KeyRing ring(base + BARRIERS_AT);
    const int row = item.first_key + item.key;
    barrier_expect(ring.full(), K_BYTES + V_BYTES);
    UNROLL for (int column = 0; column < QK_COLUMNS; column++)
      tma_load_4d(base + column * KEY_COLUMN_BYTES, k_map, ring.full(), 64 * column, row,
                  item.kv_head, item.batch);
    UNROLL for (int column = 0; column < V_COLUMNS; column++)
      tma_load_4d(base + V_AT + column * KEY_COLUMN_BYTES, v_map, ring.full(), 64 * column, row,
                  item.kv_head, item.batch);
  }
  // A block of queries or of output gradients, and one number for each of them.
  template <int COLUMNS, class AnyRing>
  __device__ void rows(AnyRing& ring, u32 at, const TensorMap& map, u32 numbers_at,
                       const float* numbers, const Item& item, const Walk& walk) {
    ring.wait_empty();
    barrier_expect(ring.full(), COLUMNS * QUERY_COLUMN_BYTES + ROW_BYTES);
    at += base + ring.place * COLUMNS * QUERY_COLUMN_BYTES;
    UNROLL for (int column = 0; column < COLUMNS; column++)
      tma_load_4d(at + column * QUERY_COLUMN_BYTES, map, ring.full(), 64 * column,
                  item.first_query + walk.block * QUERIES, walk.head, item.batch);
    bulk_load(base + numbers_at + ring.place * ROW_BYTES, numbers + (i64)walk.chunk * QUERIES,
              ROW_BYTES, ring.full());
    ring.next();
  }
  __device__ void run(const Problem& problem, const Item& item) {
    Walk walk(problem, item);
    QRing q_ring(base + Q_BARRIERS_AT);
    DoRing do_ring(base + DO_BARRIERS_AT);
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

DEVICE void add_to(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

// This warpgroup's rows of keys as left operands: in registers where those have room, so that a
// product of 64 queries reads half as much of shared memory.
constexpr bool KEYS_IN_REGISTERS = QK_DIM == 64 && V_DIM == 64;

struct Fragments {
  u32 x[KEYS_IN_REGISTERS ? 16 : 1];

  // `rows`: the first of the 64 rows of 64 elements.
  __device__ void load(u32 rows) {
    if (!KEYS_IN_REGISTERS) return;
    const u32 lane = threadIdx.x % WARP, row = threadIdx.x % WARPGROUP / WARP * 16 + lane % 16;
    UNROLL for (int step = 0; step < 4; step++) {
      u32* a = x + (KEYS_IN_REGISTERS ? 4 * step : 0);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(rows + swizzle_128(row, 2 * step + lane / 16))
                   : "memory");
    }
  }
};

// A warpgroup's part of dQ = dS K: a column of 64 elements, or half of one if it is the only one.
constexpr bool HALF = QK_COLUMNS == 1;
constexpr u32 DQ_N = HALF ? 32 : 64;
static_assert(QK_COLUMNS <= 2, "wider heads are attention_backward_keys.cu's");

struct Multiplier {
  u32 base;
  int warpgroup;
  float scale;  // on the scores, times log2(e)
  QRing q_ring;
  DoRing do_ring;
  Walk walk;
  Fragments k, v;
  float dk[QK_DIM / 2], dv[V_DIM / 2];
  float s[QUERIES / 2];  // scores, then probabilities, a row a key
  float t[QUERIES / 2];  // their gradients; then a column of dQ
  float u[PIECE / 2];    // half a column of dQ
  u32 p[QUERIES / 4];    // probabilities in 16 bits

  __device__ Multiplier(u32 base, int warpgroup, float scale, const Walk& walk)
      : base(base), warpgroup(warpgroup), scale(scale), q_ring(base + Q_BARRIERS_AT),
        do_ring(base + DO_BARRIERS_AT), walk(walk) {
    UNROLL for (float& x : dk) x = 0.f;
    UNROLL for (float& x : dv) x = 0.f;
  }

  // d[64 keys x QUERIES] = keys times queries, over `DIM` elements, contiguous in both.
  template <int DIM>
  __device__ void start_pairs(float (&d)[QUERIES / 2], const Fragments& of, u32 keys,
                              u32 queries) const {
    const u64 a = k_major_descriptor(base + keys + warpgroup * 64 * 128);
    const u64 b = k_major_descriptor(base + queries);
    keep(d);
    wgmma_fence();
    UNROLL for (int step = 0; step < DIM / 16; step++) {
      const u64 b_at = b + (step / 4 * QUERY_COLUMN_BYTES + step % 4 * 32) / 16;
      if constexpr (KEYS_IN_REGISTERS) {
        const u32* x = of.x + 4 * step;
        const u32 own[4] = {x[0], x[1], x[2], x[3]};
        multiply<QUERIES, false>(d, own, b_at, step > 0);
      } else {
        multiply<QUERIES, false, false>(d, a + (step / 4 * KEY_COLUMN_BYTES + step % 4 * 32) / 16,
                                        b_at, step > 0);
      }
    }
    wgmma_commit();
  }
  __device__ void start_scores() {
    start_pairs<QK_DIM>(s, k, 0, Q_AT + q_ring.place * Q_BYTES);
  }
  __device__ void start_dp() { start_pairs<V_DIM>(t, v, V_AT, DO_AT + do_ring.place * DO_BYTES); }

  // dv += P^T, in registers, times rows of output gradients.
  __device__ void start_dv() {
    const u64 b = mn_major_descriptor(base + DO_AT + do_ring.place * DO_BYTES, QUERY_COLUMN_BYTES);
    keep(dv);
    wgmma_fence();
    UNROLL for (int step = 0; step < QUERIES / 16; step++) {
      const u32 a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      multiply<V_DIM, true>(dv, a, b + step * 2048 / 16, true);
    }
    wgmma_commit();
  }
  // dk += dS^T times rows of queries; this warpgroup's rows of keys, the queries contiguous.
  __device__ void start_dk(u32 ds, u32 queries) {
    const u64 a = k_major_descriptor(base + ds + warpgroup * 64 * 128);
    const u64 b = mn_major_descriptor(base + queries, QUERY_COLUMN_BYTES);
    keep(dk);
    wgmma_fence();
    UNROLL for (int step = 0; step < QUERIES / 16; step++)
      multiply<QK_DIM, false, true>(dk, a + step * 32 / 16, b + step * 2048 / 16, true);
    wgmma_commit();
  }
  // What dQ is summed up in.
  __device__ auto& columns_of_dq() {
    if constexpr (HALF)
      return u;
    else
      return t;
  }
  // [QUERIES x DQ_N] = dS times all keys, the columns of this warpgroup.
  __device__ void start_dq(u32 ds) {
    const u64 a = mn_major_descriptor(base + ds, 0);
    const u32 columns = base + warpgroup * (HALF ? 64 : KEY_COLUMN_BYTES);
    const u64 b = mn_major_descriptor(columns, 0);
    auto& d = columns_of_dq();
    keep(d);
    wgmma_fence();
    UNROLL for (int step = 0; step < KEYS / 16; step++)
      multiply<DQ_N, true, true>(d, a + step * 2048 / 16, b + step * 2048 / 16, step > 0);
    wgmma_commit();
  }
  __device__ void add_dq(float* dq, int chunk) {
    constexpr int PIECES = DQ_N / PIECE;
    auto& d = columns_of_dq();
    keep(d);
    const i64 piece = (i64)chunk * (QK_DIM / PIECE) + warpgroup * PIECES;
    float* to = dq + piece * PIECE_FLOATS + threadIdx.x % WARPGROUP * 4;
    UNROLL for (int j = 0; j < 4 * PIECES; j++)
      add_to(to + j * 4 * WARPGROUP, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  }

  __device__ void hide() {
    const int window = walk.problem.window, own = 64 * warpgroup, query = walk.block * QUERIES;
    bool hides = own + 64 > walk.num_keys;
    if (CAUSAL) hides |= walk.seer + own + 63 > query;
    if (WINDOW) hides |= walk.seer + own + window <= query + QUERIES - 1;
    if (FIRST_KEYS) hides |= walk.first_key(query + QUERIES - 1) > own;
    if (!hides) return;
    const int lane = threadIdx.x % WARP;
    const int key = own + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
    const int seer = walk.seer + key - query - 2 * (lane % 4);
    UNROLL for (int i = 0; i < QUERIES / 2; i++) {
      const int column = 8 * (i / 4) + i % 2, h = i % 4 / 2;
      bool hidden = key + 8 * h >= walk.num_keys;
      if (CAUSAL) hidden |= seer + 8 * h > column;
      if (WINDOW) hidden |= seer + 8 * h + window <= column;
      if (FIRST_KEYS)
        hidden |= walk.first_key(query + 2 * (lane % 4) + column) > key + 8 * h;
      if (hidden) s[i] = -INF;
    }
  }
  __device__ void probabilities() {
    keep(s);
    hide();
    const u32 lse = base + LSE_AT + q_ring.place * ROW_BYTES + threadIdx.x % 4 * 8;
    UNROLL for (int j = 0; j < QUERIES / 8; j++) {
      const float2 of = load_pair(lse + 32 * j);
      UNROLL for (int i = 0; i < 4; i++)
        s[4 * j + i] = exp2_approx(fmaf(s[4 * j + i], scale, i % 2 ? -of.y : -of.x));
    }
    keep(s);
  }
  __device__ void round() {
    UNROLL for (int i = 0; i < QUERIES / 4; i++) p[i] = pack_16(s[2 * i], s[2 * i + 1]);
  }
  // Writes the gradients of the scores to shared memory: rows of keys, the queries contiguous.
  __device__ void share_ds(u32 ds) {
    keep(t);
    const u32 delta = base + DELTA_AT + do_ring.place * ROW_BYTES + threadIdx.x % 4 * 8;
    const int lane = threadIdx.x % WARP;
    const u32 row = warpgroup * 64 + threadIdx.x % WARPGROUP / WARP * 16 + lane % 16;
    UNROLL for (int j = 0; j < QUERIES / 8; j += 2) {
      u32 x[4];
      UNROLL for (int i = 0; i < 4; i++) {
        const float2 of = load_pair(delta + 32 * (j + i / 2));
        const int at = 4 * j + 2 * i;
        x[i] = pack_16(s[at] * (t[at] - of.x), s[at + 1] * (t[at + 1] - of.y));
      }
      stmatrix_x4(base + ds + swizzle_128(row, j + lane / 16), x[0], x[1], x[2], x[3]);
    }
    fence_shared();
    named_sync(1, 2 * WARPGROUP);
  }

  // Rows of the next packed sequence, which must not be seen even as 0 times NaN.
  __device__ void clear_other_keys() {
    if (PACKED && walk.num_keys < KEYS) {
      const int from = max(walk.num_keys, 64 * warpgroup), to = 64 * (warpgroup + 1);
      clear_rows<KEYS, QK_COLUMNS>(base, from, to);
      clear_rows<KEYS, V_COLUMNS>(base + V_AT, from, to);
      fence_shared();
      named_sync(1, 2 * WARPGROUP);
    }
  }
  template <int COLUMNS> __device__ void clear_other_queries(u32 rows) {
    const int kept = walk.num_queries - walk.block * QUERIES;
    if (PACKED && kept < QUERIES) {
      const int half = (kept + QUERIES) / 2;
      clear_rows<QUERIES, COLUMNS>(base + rows, warpgroup ? half : kept,
                                   warpgroup ? QUERIES : half);
      fence_shared();
      named_sync(1, 2 * WARPGROUP);
    }
  }
  __device__ void wait_queries() {
    q_ring.wait_full();
    clear_other_queries<QK_COLUMNS>(Q_AT + q_ring.place * Q_BYTES);
  }
  __device__ void wait_gradients() {
    do_ring.wait_full();
    clear_other_queries<V_COLUMNS>(DO_AT + do_ring.place * DO_BYTES);
  }

  __device__ void run(float* dq);
};

// Products are started in an order in which one is always under way: exponentials are computed
// during dK and the next dP, their gradients during dV, and dQ is added up during the next scores.
__device__ __forceinline__ void Multiplier::run(float* dq) {
  if (walk.count() == 0) return;
  KeyRing(base + BARRIERS_AT).wait_full();
  clear_other_keys();
  k.load(base + warpgroup * 64 * 128);
  v.load(base + V_AT + warpgroup * 64 * 128);
  keep(dk);
  keep(dv);
  wait_queries();
  start_scores();
  wait_gradients();
  start_dp();
  wgmma_wait<1>();
  probabilities();
  round();
  start_dv();
  wgmma_wait<1>();
#pragma unroll 1
  for (int left = walk.count(); left > 1; left--) {
    const u32 ds = DS_AT + left % 2 * DS_BYTES;
    share_ds(ds);
    start_dq(ds);
    const u32 queries = Q_AT + q_ring.place * Q_BYTES;
    const int chunk = walk.chunk;
    const u32 last_q = q_ring.empty();
    q_ring.next();
    walk.next();
    wait_queries();
    start_scores();
    start_dk(ds, queries);
    wgmma_wait<2>();
    add_dq(dq, chunk);
    release(do_ring.empty());
    do_ring.next();
    wait_gradients();
    start_dp();
    wgmma_wait<2>();
    probabilities();
    round();
    start_dv();
    wgmma_wait<1>();
    release(last_q);
  }
  const u32 ds = DS_AT + DS_BYTES;
  share_ds(ds);
  start_dq(ds);
  start_dk(ds, Q_AT + q_ring.place * Q_BYTES);
  wgmma_wait<1>();
  add_dq(dq, walk.chunk);
  wgmma_wait<0>();
  keep(dk);
  keep(dv);
}

// Asked for again, the item is computed again: kept over the walk, its numbers would spill.
DEVICE int block() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)
    attention_backward(const __grid_constant__ TensorMap q_map,
                       const __grid_constant__ TensorMap k_map,
                       const __grid_constant__ TensorMap v_map,
                       const __grid_constant__ TensorMap do_map, const float* lse,
                       const float* delta, float* dq, u16* dk, u16* dv, const int* q_starts,
                       const int* k_starts, const int* first_keys, int num_heads,
                       int heads_per_kv, int all_kv_heads, int num_queries, int num_keys,
                       int shift, int window, int key_blocks,
                       int query_blocks, int together, int num_sequences, int from_end, int qk_dim,
                       int v_dim, float scale, float scale_log2, i64 dk_batch, i64 dk_head,
                       i64 dk_row, i64 dv_batch, i64 dv_head, i64 dv_row) {
  extern __shared__ u8 storage[];
  const u32 base = (shared_address(storage) + 1023) & ~1023u;
  const Problem problem{num_heads,    heads_per_kv, num_heads / heads_per_kv,
                        all_kv_heads, num_queries,  num_keys,
                        shift,        window,       key_blocks,
                        query_blocks, together,     q_starts,
                        k_starts,     num_sequences, from_end,
                        first_keys};
  if (threadIdx.x == 0) {
    KeyRing(base + BARRIERS_AT).init();
    QRing(base + Q_BARRIERS_AT).init();
    DoRing(base + DO_BARRIERS_AT).init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    drop_registers<24>();
    if (threadIdx.x == 0)
      Copier{base, q_map, k_map, v_map, do_map, lse, delta}.run(problem, item_at(problem, block()));
  } else {
    raise_registers<240>();
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / (int)WARPGROUP - 1, 0);
    Multiplier multiplier(base, warpgroup, scale_log2, Walk(problem, item_at(problem, block())));
    multiplier.run(dq);
    const Item item = item_at(problem, block());
    const int key = item.key + 64 * warpgroup + threadIdx.x % WARPGROUP / WARP * 16 +
                    threadIdx.x % WARP / 4;
    const i64 row = item.first_key + key;
    const float of_dk[2] = {scale, scale}, of_dv[2] = {1.f, 1.f};
    write_rows(multiplier.dk, of_dk,
               dk + item.batch * dk_batch + item.kv_head * dk_head + row * dk_row, dk_row,
               item.num_keys - key, qk_dim);
    write_rows(multiplier.dv, of_dv,
               dv + item.batch * dv_batch + item.kv_head * dv_head + row * dv_row, dv_row,
               item.num_keys - key, v_dim);
  }
}
