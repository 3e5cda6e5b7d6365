// out[M, N] = x[M, K] weight[N, K]^T in e4m3, scaled, for few rows: what counts is how fast the
// weight streams in.
//
// The weight is the operand with 64 rows an instruction and the tokens are its columns, so no
// product is spent on rows that are not there. A cluster of SPLIT blocks shares a tile: each takes
// a stretch of K, then sums a part of the tile out of all blocks' shared memory, in their order.
#include "gemm_fp8.h"

constexpr Scaling SCALING = Scaling::GEMM_SCALING;
constexpr Number OUT = Number::GEMM_OUT, BIAS = Number::GEMM_BIAS;
constexpr u32 BLOCK_N = GEMM_BLOCK_N, TOKENS = GEMM_TOKENS, STAGES = GEMM_STAGES;
constexpr u32 SPLIT = GEMM_CLUSTER, PER_SM = GEMM_PER_SM;

constexpr u32 GROUPS = BLOCK_N / 64, CONSUMERS = GROUPS * WARPGROUP, THREADS = CONSUMERS + WARP;
constexpr u32 REGISTERS = TOKENS / 2;
constexpr u32 SCALE_N = 128;

constexpr u32 WEIGHT_BYTES = BLOCK_N * BLOCK_K, X_BYTES = TOKENS * BLOCK_K;
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
// Partial sums take the place of the stages; 4 words of padding spread a column over the banks.
constexpr u32 SUM_STRIDE = BLOCK_N + 4, SUM_BYTES = TOKENS * SUM_STRIDE * 4;
constexpr u32 RING_BYTES = STAGES * STAGE_BYTES;
constexpr u32 BARRIERS_AT = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;
constexpr u32 SCALES_AT = BARRIERS_AT + 2 * STAGES * 8;
constexpr u32 SCALE_STRIDE = TOKENS + 2;

static_assert(BLOCK_N == 64 || BLOCK_N == 128, "a tile lies in one block of weight scales");
static_assert(TOKENS % 8 == 0 && TOKENS <= 128 && SPLIT <= 8, "one instruction, one cluster");

struct Stretch {
  u32 first, end;
};

struct Scales {
  const float *x, *weight;
  i64 x_row, x_block, weight_row, weight_block;
};

DEVICE u32 full_at(u32 base, u32 stage) { return base + BARRIERS_AT + stage * 8; }
DEVICE u32 empty_at(u32 base, u32 stage) { return base + BARRIERS_AT + (STAGES + stage) * 8; }

DEVICE void produce(u32 base, const TensorMap& x_map, const TensorMap& weight_map, Stretch stretch,
                    u32 first_row, u32 first_token) {
  const u64 once = l2_evict_first();
  Ring ring;
  for (u32 block = stretch.first; block < stretch.end; block++) {
    const u32 full = full_at(base, ring.stage), at = base + ring.stage * STAGE_BYTES;
    barrier_wait(empty_at(base, ring.stage), ring.parity ^ 1);
    barrier_expect(full, STAGE_BYTES);
    if (gridDim.y == 1)
      tma_load(at, weight_map, full, block * BLOCK_K, first_row, once);
    else
      tma_load(at, weight_map, full, block * BLOCK_K, first_row);
    tma_load(at + WEIGHT_BYTES, x_map, full, block * BLOCK_K, first_token);
    ring.advance<STAGES>();
  }
}

// Products of both scales, [block][token], for this block's stretch of K. Several loads are under
// way at once: this runs while the first stages arrive.
DEVICE void stage_scales(float* staged, const Scales& scales, Stretch stretch, u32 first_row,
                         u32 first_token, u32 M) {
  constexpr u32 BATCH = 4;
  const float* weight = scales.weight + first_row / SCALE_N * scales.weight_row;
  const u32 blocks = stretch.end - stretch.first, count = blocks * TOKENS;
  for (u32 first = threadIdx.x; first < count; first += BATCH * CONSUMERS) {
    float of_x[BATCH], of_weight[BATCH];
    UNROLL for (u32 j = 0; j < BATCH; j++) {
      const u32 i = first + j * CONSUMERS, block = stretch.first + i % blocks;
      const u32 token = first_token + i / blocks;
      of_x[j] = load_scale(scales.x + token * scales.x_row + block * scales.x_block,
                           i < count && token < M);
      of_weight[j] = load_scale(weight + block * scales.weight_block, i < count);
    }
    UNROLL for (u32 j = 0; j < BATCH; j++) {
      const u32 i = first + j * CONSUMERS;
      if (i < count) staged[i % blocks * SCALE_STRIDE + i / blocks] = of_x[j] * of_weight[j];
    }
  }
}

DEVICE void multiply(float (&sum)[REGISTERS], u32 base, const float* staged, Stretch stretch) {
  const u32 group = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP;
  Ring ring;
  for (u32 block = stretch.first; block < stretch.end; block++) {
    const u32 at = base + ring.stage * STAGE_BYTES;
    const u64 a = k_major_descriptor(at + group * 64 * BLOCK_K);
    const u64 b = k_major_descriptor(at + WEIGHT_BYTES);
    float part[REGISTERS];
    barrier_wait(full_at(base, ring.stage), ring.parity);
    wgmma_fence();
    UNROLL for (u32 k = 0; k < BLOCK_K / 32; k++)
      Wgmma<TOKENS>::e4m3(part, a + 2 * k, b + 2 * k, k != 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(part);
    if (lane == 0) barrier_arrive(empty_at(base, ring.stage));
    UNROLL for (u32 j = 0; j < TOKENS / 8; j++) UNROLL for (u32 i = 0; i < 2; i++) {
      float scale = 1.0f;
      if (SCALING == Scaling::block)
        scale = staged[(block - stretch.first) * SCALE_STRIDE + j * 8 + lane % 4 * 2 + i];
      UNROLL for (u32 h = 0; h < 2; h++) {
        const u32 at = 4 * j + 2 * h + i;
        sum[at] = __fmaf_rn(part[at], scale, sum[at]);
      }
    }
    ring.advance<STAGES>();
  }
}

// Four columns of one token, out of the partial sums of every block of the cluster; where nobody uses
// them, `nearest` is the block itself: its own memory outlives a load that is not waited for.
DEVICE float4 total(const u8* shared, u32 token, u32 column, bool used, u32 nearest) {
  const u8* own = shared + (token * SUM_STRIDE + column) * 4;
  if (SPLIT == 1) return *(const float4*)own;
  const u32 at = shared_address(own);
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
  UNROLL for (u32 rank = 0; rank < SPLIT; rank++) {
    const float4 more = ld_cluster(cluster_address(at, used ? rank : nearest));
    x.x += more.x;
    x.y += more.y;
    x.z += more.z;
    x.w += more.w;
  }
  return x;
}

DEVICE void store(float4 x, const Scales& scales, const void* bias, void* out, u32 token,
                  u32 column, u32 N) {
  float values[4] = {x.x, x.y, x.z, x.w};
  UNROLL for (u32 i = 0; i < 4; i++) {
    const u32 at = min(column + i, N - 1);
    if (SCALING == Scaling::row) values[i] *= scales.x[token * scales.x_row] * scales.weight[at];
    if (SCALING == Scaling::tensor) values[i] *= *scales.x * *scales.weight;
    if (BIAS != Number::none) values[i] += load_number<BIAS>(bias, at);
  }
  const i64 at = (i64)token * N + column;
  if (OUT != Number::fp32 && N % 4 == 0 && column < N) {
    *(uint2*)((u16*)out + at) = {pack_pair<OUT>(values[0], values[1]),
                                 pack_pair<OUT>(values[2], values[3])};
    return;
  }
  UNROLL for (u32 i = 0; i < 4; i++)
    if (column + i < N) store_number<OUT>(out, at + i, values[i]);
}

// This block's part of the tile, four columns a thread, several at a time: the sums of other blocks
// are far away, and all are asked for before the first is added.
DEVICE void store_share(const u8* shared, u32 rank, u32 first_token, u32 first_row, u32 M, u32 N,
                        const Scales& scales, const void* bias, void* out) {
  constexpr u32 QUADS = TOKENS * BLOCK_N / 4, SHARE = ceil_div(QUADS, SPLIT), BATCH = 4;
  constexpr u32 ROUNDS = ceil_div(SHARE, THREADS), AT_ONCE = ROUNDS < BATCH ? ROUNDS : BATCH;
  const u32 end = min((rank + 1) * SHARE, QUADS);
  for (u32 first = rank * SHARE + threadIdx.x; first < end; first += AT_ONCE * THREADS) {
    float4 totals[AT_ONCE];
    UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 quad = min(first + i * THREADS, QUADS - 1), token = quad / (BLOCK_N / 4);
      const u32 column = quad % (BLOCK_N / 4) * 4;
      const bool used =
          first + i * THREADS < end && first_token + token < M && first_row + column < N;
      totals[i] = total(shared, token, column, used, rank);
    }
    UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 quad = first + i * THREADS, token = first_token + quad / (BLOCK_N / 4);
      if (quad < end && token < M)
        store(totals[i], scales, bias, out, token, first_row + quad % (BLOCK_N / 4) * 4, N);
    }
  }
}

#if GEMM_CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(GEMM_CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

DEVICE void sync_cluster() {
  if constexpr (SPLIT > 1)
    cluster_sync();
  else
    __syncthreads();
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, PER_SM)
    gemm_fp8_tokens(const __grid_constant__ TensorMap x_map,
                    const __grid_constant__ TensorMap weight_map, const float* x_scale,
                    const float* weight_scale, const void* bias, void* out, int M, int N, int K,
                    i64 x_row, i64 x_block, i64 weight_row, i64 weight_block) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared), rank = blockIdx.x % SPLIT;
  const u32 first_row = blockIdx.x / SPLIT * BLOCK_N, first_token = blockIdx.y * TOKENS;
  const u32 blocks_k = ceil_div<u32>(K, BLOCK_K);
  const Stretch stretch = {blocks_k * rank / SPLIT, blocks_k * (rank + 1) / SPLIT};
  const Scales scales = {x_scale, weight_scale, x_row, x_block, weight_row, weight_block};
  float* staged = (float*)(shared + SCALES_AT);
  if (threadIdx.x == CONSUMERS) {
    tma_prefetch_map(x_map);
    tma_prefetch_map(weight_map);
    for (u32 stage = 0; stage < STAGES; stage++) {
      barrier_init(full_at(base, stage), 1);
      barrier_init(empty_at(base, stage), GROUPS * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernel_ahead();
  let_next_kernel_begin();
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS)
      produce(base, x_map, weight_map, stretch, first_row, first_token);
    __syncwarp();
  } else {
    float sum[REGISTERS] = {};
    if (SCALING == Scaling::block) {
      stage_scales(staged, scales, stretch, first_row, first_token, M);
      named_sync(1, CONSUMERS);
    }
    multiply(sum, base, staged, stretch);
    named_sync(1, CONSUMERS);  // the stages have been read: partial sums may take their place
    const u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
    UNROLL for (u32 i = 0; i < REGISTERS; i++) {
      const u32 token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      ((float*)shared)[token * SUM_STRIDE + row + i / 2 % 2 * 8] = sum[i];
    }
  }
  sync_cluster();
  store_share(shared, rank, first_token, first_row, M, N, scales, bias, out);
  // No block leaves while its sums are being read. They have been once the results that follow from
  // them are on their way; a plain arrival would wait until those have reached the L2.
  if constexpr (SPLIT > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
}
