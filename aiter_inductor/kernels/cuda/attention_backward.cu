// Gradients of flash attention for sm_90: heads of 128 elements, bf16 or fp16.
//
// A block owns 128 keys of one head, half for each of two warpgroups, and walks over the queries
// that see them, 64 at a time, of all heads that share these keys. Scores are kept transposed, a
// row a key, so that the probabilities and their gradients, in registers, are the left operands of
// dV += P^T dO and dK += dS^T Q. dS^T also goes through shared memory, for dQ = dS K, whose parts
// are added up in fp32 in global memory. One warp copies by TMA.
//
// The build defines CAUSAL, WINDOW and FP16 (0 or 1), and SHARED_BYTES.

#include "attention_rows.h"
#include "ring.h"
#include "tma.h"
#include "wgmma.h"

constexpr int WIDTH = 128;  // of heads
constexpr int KEYS = 128, QUERIES = 64;
constexpr u32 READERS = 8;  // warps that multiply
constexpr u32 STAGES = 2;

constexpr u32 KEY_COLUMN_BYTES = KEYS * 128, QUERY_COLUMN_BYTES = QUERIES * 128;
constexpr u32 KEY_BYTES = 2 * KEY_COLUMN_BYTES, QUERY_BYTES = 2 * QUERY_COLUMN_BYTES;
constexpr u32 ROW_BYTES = QUERIES * 4;  // one number a query
constexpr u32 DS_BYTES = KEYS * 128;

constexpr u32 V_AT = KEY_BYTES;
constexpr u32 Q_AT = V_AT + KEY_BYTES;
constexpr u32 DO_AT = Q_AT + STAGES * QUERY_BYTES;
constexpr u32 DS_AT = DO_AT + STAGES * QUERY_BYTES;
constexpr u32 LSE_AT = DS_AT + 2 * DS_BYTES;
constexpr u32 DELTA_AT = LSE_AT + STAGES * ROW_BYTES;
constexpr u32 BARRIERS_AT = DELTA_AT + STAGES * ROW_BYTES;

using KeyRing = Ring<1, READERS>;
using QueryRing = Ring<STAGES, READERS>;
constexpr u32 Q_BARRIERS_AT = BARRIERS_AT + KeyRing::BYTES;
constexpr u32 DO_BARRIERS_AT = Q_BARRIERS_AT + QueryRing::BYTES;
static_assert(1024 + DO_BARRIERS_AT + QueryRing::BYTES == SHARED_BYTES,
              "attention_backward.py counts otherwise");

struct Problem {
  int num_heads, heads_per_kv, kv_heads, all_kv_heads;
  int num_queries, num_keys, shift, window;
  int key_blocks, query_blocks, together;
};

// KEYS keys of one head, seen by query blocks [begin, end) of each head that shares them.
struct Item {
  int batch, kv_head, key, begin, end;
};

// Under a causal mask the first keys are seen by most queries: they come first.
DEVICE Item item_at(const Problem& problem, int index) {
  const int per_group = problem.together * problem.key_blocks;
  const int first = index / per_group * problem.together, rest = index % per_group;
  const int heads = min(problem.together, problem.all_kv_heads - first);
  const int head = first + rest % heads;
  Item item{head / problem.kv_heads, head % problem.kv_heads, rest / heads * KEYS, 0,
            problem.query_blocks};
  if (CAUSAL) item.begin = min(max(item.key - problem.shift, 0) / QUERIES, item.end);
  if (WINDOW) {
    const int newest = item.key + KEYS - 2 + problem.window - problem.shift;
    item.end = max(min(item.end, newest < 0 ? 0 : newest / QUERIES + 1), item.begin);
  }
  return item;
}


// What a block works with, in the order in which both kinds of warps walk over it.
struct Walk {
  Problem problem;
  Item item;

  __device__ int count() const { return (item.end - item.begin) * problem.heads_per_kv; }
  __device__ int head(int step) const {
    return item.kv_head * problem.heads_per_kv + step / (item.end - item.begin);
  }
  __device__ int block(int step) const { return item.begin + step % (item.end - item.begin); }
  // Of what is kept for each block of queries of each head.
  __device__ i64 chunk(int step) const {
    return (i64)(item.batch * problem.num_heads + head(step)) * problem.query_blocks + block(step);
  }
};

struct Copier {
  u32 base;
  const TensorMap &q_map, &k_map, &v_map, &do_map;
  const float *lse, *delta;

  __device__ void keys(const Walk& walk) {
    const KeyRing ring(base + BARRIERS_AT);
    barrier_expect(ring.full(), 2 * KEY_BYTES);
    const Item& item = walk.item;
    UNROLL for (int column = 0; column < 2; column++) {
      const u32 at = base + column * KEY_COLUMN_BYTES;
      tma_load_4d(at, k_map, ring.full(), 64 * column, item.key, item.kv_head, item.batch);
      tma_load_4d(at + V_AT, v_map, ring.full(), 64 * column, item.key, item.kv_head, item.batch);
    }
  }
  // A block of queries or of output gradients, and one number for each of them.
  __device__ void rows(QueryRing& ring, u32 at, const TensorMap& map, u32 numbers_at,
                       const float* numbers, const Walk& walk, int step) {
    ring.wait_empty();
    barrier_expect(ring.full(), QUERY_BYTES + ROW_BYTES);
    at += base + ring.place * QUERY_BYTES;
    UNROLL for (int column = 0; column < 2; column++)
      tma_load_4d(at + column * QUERY_COLUMN_BYTES, map, ring.full(), 64 * column,
                  walk.block(step) * QUERIES, walk.head(step), walk.item.batch);
    bulk_load(base + numbers_at + ring.place * ROW_BYTES, numbers + walk.chunk(step) * QUERIES,
              ROW_BYTES, ring.full());
    ring.next();
  }
  __device__ void run(const Walk& walk) {
    QueryRing q_ring(base + Q_BARRIERS_AT), do_ring(base + DO_BARRIERS_AT);
    if (walk.count() == 0) return;
    keys(walk);
#pragma unroll 1
    for (int step = 0; step < walk.count(); step++) {
      rows(q_ring, Q_AT, q_map, LSE_AT, lse, walk, step);
      rows(do_ring, DO_AT, do_map, DELTA_AT, delta, walk, step);
    }
  }
};

DEVICE float2 load_pair(u32 shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared) : "memory");
  return x;
}

DEVICE void add_to(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

template <u32 N, bool A_MN, bool B_MN>
DEVICE void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
  if (FP16)
    Wgmma<N>::template fp16<A_MN, B_MN>(d, a, b, accumulate);
  else
    Wgmma<N>::template bf16<A_MN, B_MN>(d, a, b, accumulate);
}
template <u32 N>
DEVICE void multiply(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  if (FP16)
    Wgmma<N>::template fp16<true>(d, a, b, accumulate);
  else
    Wgmma<N>::template bf16<true>(d, a, b, accumulate);
}

struct Multiplier {
  u32 base;
  int warpgroup;
  float scale;  // on the scores, times log2(e)
  QueryRing q_ring, do_ring;
  float dk[WIDTH / 2], dv[WIDTH / 2];
  float s[QUERIES / 2];  // scores, then probabilities, a row a key
  float t[QUERIES / 2];  // their gradients; then this warpgroup's half of the width of dQ
  u32 p[QUERIES / 4];    // probabilities in 16 bits

  __device__ Multiplier(u32 base, int warpgroup, float scale)
      : base(base), warpgroup(warpgroup), scale(scale), q_ring(base + Q_BARRIERS_AT),
        do_ring(base + DO_BARRIERS_AT) {
    UNROLL for (int i = 0; i < WIDTH / 2; i++) dk[i] = dv[i] = 0.f;
  }

  // d[64 keys x QUERIES] = keys times queries; all widths contiguous.
  __device__ void start_pairs(float (&d)[QUERIES / 2], u32 keys, u32 queries) const {
    const u64 a = k_major_descriptor(base + keys + warpgroup * 64 * 128);
    const u64 b = k_major_descriptor(base + queries);
    keep(d);
    wgmma_fence();
    UNROLL for (int step = 0; step < WIDTH / 16; step++)
      multiply<QUERIES, false, false>(
          d, a + (step / 4 * KEY_COLUMN_BYTES + step % 4 * 32) / 16,
          b + (step / 4 * QUERY_COLUMN_BYTES + step % 4 * 32) / 16, step > 0);
    wgmma_commit();
  }
  // dv += P^T, in registers, times rows of output gradients.
  __device__ void start_dv(u32 rows) {
    const u64 b = mn_major_descriptor(base + rows, QUERY_COLUMN_BYTES);
    keep(dv);
    wgmma_fence();
    UNROLL for (int step = 0; step < QUERIES / 16; step++) {
      const u32 a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      multiply<WIDTH>(dv, a, b + step * 2048 / 16, true);
    }
    wgmma_commit();
  }
  // dk += dS^T times rows of queries; this warpgroup's rows of keys, the queries contiguous.
  __device__ void start_dk(u32 ds, u32 rows) {
    const u64 a = k_major_descriptor(base + ds + warpgroup * 64 * 128);
    const u64 b = mn_major_descriptor(base + rows, QUERY_COLUMN_BYTES);
    keep(dk);
    wgmma_fence();
    UNROLL for (int step = 0; step < QUERIES / 16; step++)
      multiply<WIDTH, false, true>(dk, a + step * 32 / 16, b + step * 2048 / 16, true);
    wgmma_commit();
  }
  // t[QUERIES x 64] = dS times all keys, the columns of this warpgroup.
  __device__ void start_dq(u32 ds) {
    const u64 a = mn_major_descriptor(base + ds, 0);
    const u64 b = mn_major_descriptor(base + warpgroup * KEY_COLUMN_BYTES, 0);
    keep(t);
    wgmma_fence();
    UNROLL for (int step = 0; step < KEYS / 16; step++)
      multiply<64, true, true>(t, a + step * 2048 / 16, b + step * 2048 / 16, step > 0);
    wgmma_commit();
  }
  __device__ void start_scores() { start_pairs(s, 0, Q_AT + q_ring.place * QUERY_BYTES); }

  __device__ void hide(const Walk& walk, int step) {
    const Problem& problem = walk.problem;
    const int own = walk.item.key + 64 * warpgroup, query = walk.block(step) * QUERIES;
    bool hides = own + 64 > problem.num_keys;
    if (CAUSAL) hides |= own + 63 > query + problem.shift;
    if (WINDOW) hides |= own <= query + QUERIES - 1 + problem.shift - problem.window;
    if (!hides) return;
    const int lane = threadIdx.x % WARP;
    const int key = own + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
    const int at = query + problem.shift + 2 * (lane % 4);  // the key of the first own query
    UNROLL for (int i = 0; i < QUERIES / 2; i++) {
      const int column = 8 * (i / 4) + i % 2, h = i % 4 / 2;
      bool hidden = key + 8 * h >= problem.num_keys;
      if (CAUSAL) hidden |= key + 8 * h - at > column;
      if (WINDOW) hidden |= key + 8 * h - at + problem.window <= column;
      if (hidden) s[i] = -INF;
    }
  }
  __device__ void probabilities(const Walk& walk, int step) {
    keep(s);
    hide(walk, step);
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
  __device__ void add_dq(float* dq, i64 chunk) {
    keep(t);
    float* to = dq + chunk * (QUERIES * WIDTH) + warpgroup * (QUERIES * WIDTH / 2) +
                threadIdx.x % WARPGROUP * 4;
    UNROLL for (int j = 0; j < QUERIES / 8; j++)
      add_to(to + j * 4 * WARPGROUP, t[4 * j], t[4 * j + 1], t[4 * j + 2], t[4 * j + 3]);
  }

  __device__ void run(const Walk& walk, float* dq);
};

__device__ __forceinline__ void Multiplier::run(const Walk& walk, float* dq) {
  const int count = walk.count();
  if (count == 0) return;
  KeyRing(base + BARRIERS_AT).wait_full();
  q_ring.wait_full();
  start_scores();
  wgmma_wait<0>();
  probabilities(walk, 0);
  u32 last_q = 0;
  for (int step = 0;; step++) {
    const u32 ds = DS_AT + step % 2 * DS_BYTES;
    const u32 rows = DO_AT + do_ring.place * QUERY_BYTES;
    // Between exponentials and the wait for wgmma, which ptxas would move up over them.
    do_ring.wait_full();
    wgmma_wait<0>();
    if (step > 0) {
      add_dq(dq, walk.chunk(step - 1));
      release(last_q);
    }
    round();
    start_pairs(t, V_AT, rows);
    start_dv(rows);
    wgmma_wait<1>();
    keep(t);
    share_ds(ds);
    const u32 queries = Q_AT + q_ring.place * QUERY_BYTES;
    last_q = q_ring.empty();
    if (step + 1 == count) {
      start_dk(ds, queries);
      start_dq(ds);
      break;
    }
    q_ring.next();
    q_ring.wait_full();
    start_scores();
    start_dk(ds, queries);
    start_dq(ds);
    wgmma_wait<2>();
    release(do_ring.empty());
    do_ring.next();
    probabilities(walk, step + 1);
  }
  wgmma_wait<0>();
  add_dq(dq, walk.chunk(count - 1));
  keep(dk);
  keep(dv);
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)
    attention_backward(const __grid_constant__ TensorMap q_map,
                       const __grid_constant__ TensorMap k_map,
                       const __grid_constant__ TensorMap v_map,
                       const __grid_constant__ TensorMap do_map, const float* lse,
                       const float* delta, float* dq, u16* dk, u16* dv, int num_heads,
                       int heads_per_kv, int all_kv_heads, int num_queries, int num_keys, int shift,
                       int window, int together, int qk_dim, int v_dim, float scale,
                       float scale_log2) {
  extern __shared__ u8 storage[];
  const u32 base = (shared_address(storage) + 1023) & ~1023u;
  const Problem problem{num_heads,
                        heads_per_kv,
                        num_heads / heads_per_kv,
                        all_kv_heads,
                        num_queries,
                        num_keys,
                        shift,
                        window,
                        ceil_div(num_keys, KEYS),
                        ceil_div(num_queries, QUERIES),
                        together};
  const Walk walk{problem, item_at(problem, blockIdx.x)};
  if (threadIdx.x == 0) {
    KeyRing(base + BARRIERS_AT).init();
    QueryRing(base + Q_BARRIERS_AT).init();
    QueryRing(base + DO_BARRIERS_AT).init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    drop_registers<24>();
    if (threadIdx.x == 0) Copier{base, q_map, k_map, v_map, do_map, lse, delta}.run(walk);
  } else {
    raise_registers<240>();
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / (int)WARPGROUP - 1, 0);
    Multiplier multiplier(base, warpgroup, scale_log2);
    multiplier.run(walk, dq);
    const int key = walk.item.key + 64 * warpgroup + threadIdx.x % WARPGROUP / WARP * 16 +
                    threadIdx.x % WARP / 4;
    const i64 row = (i64)(walk.item.batch * problem.kv_heads + walk.item.kv_head) * num_keys + key;
    const float of_dk[2] = {scale, scale}, of_dv[2] = {1.f, 1.f};
    write_rows(multiplier.dk, of_dk, dk + row * qk_dim, qk_dim, num_keys - key, qk_dim);
    write_rows(multiplier.dv, of_dv, dv + row * v_dim, v_dim, num_keys - key, v_dim);
  }
}

// ---- before and after

// For each query, padded to whole blocks: its log-sum-exp in powers of two, plus infinity where it
// sees nothing, and what the normalisation takes from the gradient of every probability. A warp a
// query; strides of out and its gradient in elements.
extern "C" __global__ void attention_backward_rows(
    const u16* out, const u16* grad, const float* lse, const float* grad_lse, float* lse_log2,
    float* delta, int num_heads, int num_queries, int all_rows, int v_dim, i64 out_batch,
    i64 out_head, i64 out_row, i64 grad_batch, i64 grad_head, i64 grad_row) {
  const int padded = ceil_div(num_queries, QUERIES) * QUERIES, lane = threadIdx.x % WARP;
  const int index = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (index >= all_rows) return;
  const int head = index / padded, row = index % padded, batch = head / num_heads;
  float sum = 0.f, log_sum = INF;
  if (row < num_queries) {
    const u16* o = out + batch * out_batch + head % num_heads * out_head + row * out_row;
    const u16* d = grad + batch * grad_batch + head % num_heads * grad_head + row * grad_row;
    for (int i = lane * 2; i < v_dim; i += 2 * WARP) {
      const float2 x = unpack_16(*(const u32*)(o + i)), y = unpack_16(*(const u32*)(d + i));
      sum += x.x * y.x + x.y * y.y;
    }
    UNROLL for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const i64 at = (i64)head * num_queries + row;
    if (grad_lse) sum -= grad_lse[at];
    log_sum = lse[at] == -INF ? INF : lse[at] * LOG2_E;
  }
  if (lane == 0) {
    lse_log2[index] = log_sum;
    delta[index] = sum;
  }
}

// dQ out of the parts that attention_backward added up in the order of its registers. A block for
// each block of queries; dq is contiguous [batch, heads, num_queries, qk_dim].
extern "C" __global__ void attention_backward_dq(const float* parts, u16* dq, int num_queries,
                                                 int qk_dim, float scale) {
  const int blocks = ceil_div(num_queries, QUERIES);
  const int warpgroup = threadIdx.x / WARPGROUP, head = blockIdx.x / blocks;
  const int row = blockIdx.x % blocks * QUERIES + threadIdx.x % WARPGROUP / WARP * 16 +
                  threadIdx.x % WARP / 4;
  const float4* from = (const float4*)(parts + (i64)blockIdx.x * (QUERIES * WIDTH)) +
                       warpgroup * (QUERIES * WIDTH / 8) + threadIdx.x % WARPGROUP;
  float d[QUERIES / 2];
  UNROLL for (int j = 0; j < QUERIES / 8; j++) {
    const float4 x = from[j * WARPGROUP];
    d[4 * j] = x.x, d[4 * j + 1] = x.y, d[4 * j + 2] = x.z, d[4 * j + 3] = x.w;
  }
  const float factor[2] = {scale, scale};
  u16* to = dq + ((i64)head * num_queries + row) * qk_dim + 64 * warpgroup;
  write_rows(d, factor, to, qk_dim, num_queries - row, qk_dim - 64 * warpgroup);
}
