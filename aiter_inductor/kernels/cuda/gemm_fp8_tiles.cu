// out[M, N] = x[M, K] weight[N, K]^T in e4m3, scaled, for many rows.
//
// Persistent and warp-specialised: a warp of the last warpgroup copies BLOCK_K bytes of K of both
// operands a stage by TMA; two warpgroups multiply, each BLOCK_M / 2 rows. A product of BLOCK_K
// goes into `part` and is added to `sum` with its scales by ordinary FMAs, which the other
// warpgroup's products hide. wgmma adds fp8 products with fewer bits than fp32, so sums do not stay
// there.
//
// In a cluster of two the blocks have neighbouring tiles along M and each copies half of the
// weight's tile for both.
#include "gemm_fp8.h"

constexpr Scaling SCALING = Scaling::GEMM_SCALING;
constexpr Number OUT = Number::GEMM_OUT, BIAS = Number::GEMM_BIAS;
constexpr u32 BLOCK_M = GEMM_BLOCK_M, BLOCK_N = GEMM_BLOCK_N, WIDTH = GEMM_WIDTH;
constexpr u32 STAGES = GEMM_STAGES, CLUSTER = GEMM_CLUSTER, BAND = GEMM_BAND;
constexpr bool STORE_BY_TMA = GEMM_STORE_BY_TMA;

constexpr u32 CONSUMERS = 2, THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr u32 GROUP_M = BLOCK_M / CONSUMERS, STEPS_M = GROUP_M / 64, STEPS_N = BLOCK_N / WIDTH;
constexpr u32 REGISTERS = WIDTH / 2;
constexpr u32 SCALE_N = 128, LANES = 4;

constexpr u32 X_BYTES = BLOCK_M * BLOCK_K, WEIGHT_BYTES = BLOCK_N * BLOCK_K;
constexpr u32 STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
// Results leave through shared memory, each warp's 16 rows by themselves: boxes of rows of at most
// 128 bytes, in OUT_SLOTS places by turns.
constexpr u32 BOX_N = WIDTH % 64 == 0 ? 64 : WIDTH % 32 == 0 ? 32 : 16;
constexpr u32 BOX_BYTES = 16 * BOX_N * 2, OUT_SLOTS = 2, WARP_OUT_BYTES = OUT_SLOTS * BOX_BYTES;
constexpr u32 OUT_AT = STAGES * STAGE_BYTES;
constexpr u32 BARRIERS_AT = OUT_AT + (STORE_BY_TMA ? CONSUMERS * 4 * WARP_OUT_BYTES : 0);

static_assert(BLOCK_M % (64 * CONSUMERS) == 0 && BLOCK_N % WIDTH == 0, "whole instructions");
static_assert(WIDTH % 16 == 0 && BLOCK_N % (8 * CLUSTER) == 0 && BLOCK_N <= 256, "tiles of wgmma");
// Columns of one instruction lie in one block of weight scales, or in two with a known grain.
constexpr bool ONE_SCALE =
    SCALE_N % WIDTH == 0 && (SCALE_N % BLOCK_N == 0 || BLOCK_N % SCALE_N == 0);
constexpr u32 SIDES = ONE_SCALE ? 1 : 2;

struct Problem {
  u32 M, N, blocks_k, tiles_m, tiles_n, tiles;
};

DEVICE u32 full_at(u32 base, u32 stage) { return base + BARRIERS_AT + stage * 8; }
DEVICE u32 empty_at(u32 base, u32 stage) { return base + BARRIERS_AT + (STAGES + stage) * 8; }

// Tiles are dealt to clusters; within one, blocks take neighbours along M.
DEVICE Tile tile_of(const Problem& problem, u32 index) {
  const Tile pair = tile_at(index, problem.tiles_m, problem.tiles_n, BAND);
  return {pair.m * CLUSTER + (CLUSTER > 1 ? cluster_rank() : 0), pair.n};
}

DEVICE void produce(const Problem& problem, u32 base, const TensorMap& x_map,
                    const TensorMap& weight_map) {
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
  constexpr u32 SHARE = BLOCK_N / CLUSTER;
  Ring ring;
  for (u32 index = blockIdx.x / CLUSTER; index < problem.tiles; index += gridDim.x / CLUSTER) {
    const Tile tile = tile_of(problem, index);
    for (u32 block = 0; block < problem.blocks_k; block++) {
      const u32 full = full_at(base, ring.stage), at = base + ring.stage * STAGE_BYTES;
      barrier_wait(empty_at(base, ring.stage), ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);
      tma_load(at, x_map, full, block * BLOCK_K, tile.m * BLOCK_M);
      if constexpr (CLUSTER == 1)
        tma_load(at + X_BYTES, weight_map, full, block * BLOCK_K, tile.n * BLOCK_N);
      else
        tma_load_multicast(at + X_BYTES + rank * SHARE * BLOCK_K, weight_map, full, block * BLOCK_K,
                           tile.n * BLOCK_N + rank * SHARE, (1 << CLUSTER) - 1);
      ring.advance<STAGES>();
    }
  }
}

struct Scales {
  const float *x, *weight;
  i64 x_row, x_block, weight_row, weight_block;
};

// Products of the scales of one block of K, by the block of the weight and the row of this thread.
struct BlockScales {
  float by[STEPS_M][STEPS_N][SIDES][2];
};

// Scales as they are loaded. The four lanes of a row, which need the same ones, load one block of K
// each and pass it on: every load has sectors of its own, and a quarter of the loads remain. Loads
// of each block by each lane cost a tenth of the product's time. Shared memory has no room for them:
// at the full rate of the tensor cores a tile of 128x256 asks it for 144 of its 128 bytes a clock, and
// scales that came with their stage cost 3 % (4096x7168x16384 on an H100, 716 us and 696).
struct LaneScales {
  float x[STEPS_M][2], weight[STEPS_N][SIDES];

  __device__ __forceinline__ BlockScales products() const {
    BlockScales found;
    UNROLL for (u32 m = 0; m < STEPS_M; m++) UNROLL for (u32 n = 0; n < STEPS_N; n++)
      UNROLL for (u32 i = 0; i < SIDES; i++) UNROLL for (u32 h = 0; h < 2; h++)
        found.by[m][n][i][h] = x[m][h] * weight[n][i];
    return found;
  }
};

// What lane `lane` of each four holds.
DEVICE BlockScales of_lane(const BlockScales& scales, u32 lane) {
  BlockScales found;
  UNROLL for (u32 m = 0; m < STEPS_M; m++) UNROLL for (u32 n = 0; n < STEPS_N; n++)
    UNROLL for (u32 i = 0; i < SIDES; i++) UNROLL for (u32 h = 0; h < 2; h++)
      found.by[m][n][i][h] = __shfl_sync(~0u, scales.by[m][n][i][h], lane, LANES);
  return found;
}

// Where this lane's next scales lie, over all tiles of this block in turn.
struct ScaleCursor {
  const float *x[STEPS_M][2], *weight[STEPS_N][SIDES];
  u32 index, first;  // of the tile, and of the next LANES blocks of K

  // `row` is this thread's first in a tile.
  __device__ __forceinline__ void start(const Problem& problem, const Scales& scales, u32 row) {
    const Tile tile = tile_of(problem, min(index, problem.tiles - 1));
    const u32 lane = threadIdx.x % LANES, last = (problem.N - 1) / SCALE_N;
    UNROLL for (u32 m = 0; m < STEPS_M; m++) UNROLL for (u32 h = 0; h < 2; h++) {
      const u32 at = min(tile.m * BLOCK_M + row + m * 64 + h * 8, problem.M - 1);
      x[m][h] = scales.x + at * scales.x_row + lane * scales.x_block;
    }
    UNROLL for (u32 n = 0; n < STEPS_N; n++) UNROLL for (u32 i = 0; i < SIDES; i++) {
      const u32 at = min((tile.n * BLOCK_N + n * WIDTH) / SCALE_N + i, last);
      weight[n][i] = scales.weight + at * scales.weight_row + lane * scales.weight_block;
    }
    first = 0;
  }

  __device__ __forceinline__ LaneScales load(const Problem& problem, const Scales& scales,
                                             u32 row) {
    LaneScales found;
    const bool there = first + threadIdx.x % LANES < problem.blocks_k;
    UNROLL for (u32 m = 0; m < STEPS_M; m++) UNROLL for (u32 h = 0; h < 2; h++) {
      found.x[m][h] = load_scale(x[m][h], there);
      x[m][h] += LANES * scales.x_block;
    }
    UNROLL for (u32 n = 0; n < STEPS_N; n++) UNROLL for (u32 i = 0; i < SIDES; i++) {
      found.weight[n][i] = load_scale(weight[n][i], there);
      weight[n][i] += LANES * scales.weight_block;
    }
    first += LANES;
    if (first >= problem.blocks_k) {
      index += gridDim.x / CLUSTER;
      start(problem, scales, row);
    }
    return found;
  }
};

// sum += part * scales; `first` is the instruction's first column.
DEVICE void promote(float (&sum)[REGISTERS], const float (&part)[REGISTERS],
                    const float (&by)[SIDES][2], u32 first) {
  const u32 border = SCALE_N - first % SCALE_N;
  UNROLL for (u32 j = 0; j < WIDTH / 8; j++) {
    const bool next = !ONE_SCALE && j * 8 / BOX_N * BOX_N >= border;
    const float low = next ? by[SIDES - 1][0] : by[0][0], high = next ? by[SIDES - 1][1] : by[0][1];
    sum[4 * j] = __fmaf_rn(part[4 * j], low, sum[4 * j]);
    sum[4 * j + 1] = __fmaf_rn(part[4 * j + 1], low, sum[4 * j + 1]);
    sum[4 * j + 2] = __fmaf_rn(part[4 * j + 2], high, sum[4 * j + 2]);
    sum[4 * j + 3] = __fmaf_rn(part[4 * j + 3], high, sum[4 * j + 3]);
  }
}

// Scales of whole rows and columns, and the bias, on the sums of one instruction.
DEVICE void finish(float (&sum)[REGISTERS], const Problem& problem, const Scales& scales,
                   const void* bias, u32 row, u32 column) {
  float of_row[2] = {1.0f, 1.0f};
  if constexpr (SCALING == Scaling::tensor) of_row[0] = of_row[1] = *scales.x * *scales.weight;
  if constexpr (SCALING == Scaling::row)
    UNROLL for (u32 h = 0; h < 2; h++) of_row[h] = scales.x[min(row + h * 8, problem.M - 1)];
  UNROLL for (u32 j = 0; j < WIDTH / 8; j++) UNROLL for (u32 i = 0; i < 2; i++) {
    const u32 at = min(column + j * 8 + i, problem.N - 1);
    const float of_column = SCALING == Scaling::row ? scales.weight[at] : 1.0f;
    const float more = load_number<BIAS>(bias, at);
    UNROLL for (u32 h = 0; h < 2; h++) {
      float& x = sum[4 * j + 2 * h + i];
      x = SCALING == Scaling::block ? x + more : __fmaf_rn(x, of_row[h] * of_column, more);
    }
  }
}

DEVICE void store_plain(const float (&sum)[REGISTERS], const Problem& problem, void* out, u32 row,
                        u32 column) {
  UNROLL for (u32 i = 0; i < REGISTERS; i++) {
    const u32 at_m = row + i / 2 % 2 * 8, at_n = column + i / 4 * 8 + i % 2;
    if (at_m < problem.M && at_n < problem.N)
      store_number<OUT>(out, (i64)at_m * problem.N + at_n, sum[i]);
  }
}

// One box of the sums of an instruction, its columns from `first` on, into a warp's 16 rows at `at`.
DEVICE void stage_out(const float (&sum)[REGISTERS], u32 first, u32 at, u32 lane) {
  constexpr u32 ROW_BYTES = BOX_N * 2, MASK = ROW_BYTES / 16 - 1;
  UNROLL for (u32 j = 0; j < BOX_N / 16; j++) {
    const u32 plain = lane % 16 * ROW_BYTES + (2 * j + lane / 16) * 16;
    const float* from = sum + first / 2 + 8 * j;
    stmatrix_x4(at + (plain ^ (plain >> 7 & MASK) << 4), pack_pair<OUT>(from[0], from[1]),
                pack_pair<OUT>(from[2], from[3]), pack_pair<OUT>(from[4], from[5]),
                pack_pair<OUT>(from[6], from[7]));
  }
}

// The products of one block of K, added to `sum`; `prefetch` is called while the first is computed.
// Both operands come from shared memory: x in registers, loaded once for all columns, would ask less
// of it, but each product then waits for ldmatrix (782 us instead of 716).
template <class Prefetch>
DEVICE void multiply(float (&sum)[STEPS_M][STEPS_N][REGISTERS], u32 base, u32 group, Ring ring,
                     const BlockScales& scales, u32 column, Prefetch prefetch) {
  const u32 x_at = base + ring.stage * STAGE_BYTES + group * GROUP_M * BLOCK_K;
  const u32 weight_at = base + ring.stage * STAGE_BYTES + X_BYTES, lane = threadIdx.x % WARP;
  UNROLL for (u32 m = 0; m < STEPS_M; m++) UNROLL for (u32 n = 0; n < STEPS_N; n++) {
    float part[REGISTERS];
    const u64 a = k_major_descriptor(x_at + m * 64 * BLOCK_K);
    const u64 b = k_major_descriptor(weight_at + n * WIDTH * BLOCK_K);
    wgmma_fence();
    UNROLL for (u32 k = 0; k < BLOCK_K / 32; k++)
      Wgmma<WIDTH>::e4m3(part, a + 2 * k, b + 2 * k, k != 0);
    wgmma_commit();
    if (SCALING == Scaling::block && m == 0 && n == 0) prefetch();
    wgmma_wait<0>();
    keep(part);
    if (m + 1 == STEPS_M && n + 1 == STEPS_N && lane < CLUSTER) {
      if constexpr (CLUSTER == 1)
        barrier_arrive(empty_at(base, ring.stage));
      else
        barrier_arrive_remote(empty_at(base, ring.stage), lane);
    }
    if constexpr (SCALING == Scaling::block)
      promote(sum[m][n], part, scales.by[m][n], column + n * WIDTH);
    else
      UNROLL for (u32 i = 0; i < REGISTERS; i++) sum[m][n][i] += part[i];
  }
}

// The sums of one instruction to a warp's 16 rows of the result, a box at a time; `slot` is the place
// in shared memory that the next one takes.
DEVICE void store_boxes(const float (&sum)[REGISTERS], const TensorMap& out_map, u32 staging,
                        u32& slot, u32 row, u32 column) {
  const u32 lane = threadIdx.x % WARP;
  UNROLL for (u32 box = 0; box < WIDTH; box += BOX_N) {
    const u32 at = staging + slot * BOX_BYTES;
    // The lane that stores waits until the copy before the last has read its place.
    if (lane == 0) tma_store_wait_read<OUT_SLOTS - 1>();
    __syncwarp();
    stage_out(sum, box, at, lane);
    fence_shared();
    __syncwarp();
    if (lane == 0) {
      tma_store(out_map, at, column + box, row);
      tma_store_commit();
    }
    slot ^= 1;
  }
}

// Sums to results, while the producer is at the next tile already. Each warp stores its own rows,
// so that none waits for another.
DEVICE void store_tile(float (&sum)[STEPS_M][STEPS_N][REGISTERS], const Problem& problem, u32 base,
                       u32 group, Tile tile, const Scales& scales, const void* bias, void* out,
                       const TensorMap& out_map, u32& slot) {
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const u32 staging = base + OUT_AT + warp * WARP_OUT_BYTES;
  const u32 first_row = tile.m * BLOCK_M + group * GROUP_M + warp % 4 * 16;
  UNROLL for (u32 n = 0; n < STEPS_N; n++) UNROLL for (u32 m = 0; m < STEPS_M; m++) {
    const u32 row = first_row + m * 64, own_row = row + lane / 4;
    const u32 first = tile.n * BLOCK_N + n * WIDTH, own_column = first + lane % 4 * 2;
    if constexpr (SCALING != Scaling::block || BIAS != Number::none)
      finish(sum[m][n], problem, scales, bias, own_row, own_column);
    if constexpr (STORE_BY_TMA)
      store_boxes(sum[m][n], out_map, staging, slot, row, first);
    else
      store_plain(sum[m][n], problem, out, own_row, own_column);
  }
}

DEVICE void consume(const Problem& problem, u32 base, u32 group, const Scales& scales,
                    const void* bias, void* out, const TensorMap& out_map) {
  const u32 row = group * GROUP_M + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
  u32 index = blockIdx.x / CLUSTER;
  if (index >= problem.tiles) return;
  u32 slot = 0;
  Ring ring;
  ScaleCursor cursor;
  LaneScales later;
  BlockScales loaded, now, next;
  if constexpr (SCALING == Scaling::block) {
    cursor.index = index;
    cursor.start(problem, scales, row);
    loaded = cursor.load(problem, scales, row).products();
    later = cursor.load(problem, scales, row);
    next = of_lane(loaded, 0);
  }
  for (; index < problem.tiles; index += gridDim.x / CLUSTER) {
    const Tile tile = tile_of(problem, index);
    float sum[STEPS_M][STEPS_N][REGISTERS] = {};
    for (u32 block = 0; block < problem.blocks_k; block++) {
      now = next;
      barrier_wait(full_at(base, ring.stage), ring.parity);
      multiply(sum, base, group, ring, now, tile.n * BLOCK_N, [&] {
        const u32 lane = block + 1 == problem.blocks_k ? 0 : (block + 1) % LANES;
        if (lane == 0) {
          loaded = later.products();
          later = cursor.load(problem, scales, row);
        }
        next = of_lane(loaded, lane);
      });
      ring.advance<STAGES>();
    }
    store_tile(sum, problem, base, group, tile, scales, bias, out, out_map, slot);
  }
  if (STORE_BY_TMA && threadIdx.x % WARP == 0) tma_store_wait<0>();
}

#if GEMM_CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(GEMM_CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    gemm_fp8_tiles(const __grid_constant__ TensorMap x_map,
                   const __grid_constant__ TensorMap weight_map,
                   const __grid_constant__ TensorMap out_map, const float* x_scale,
                   const float* weight_scale, const void* bias, void* out, int M, int N, int K,
                   i64 x_row, i64 x_block, i64 weight_row, i64 weight_block) {
  extern __shared__ __align__(1024) u8 shared[];
  // Through a register and a shuffle, so that neither is worked out again in the loop over K.
  u32 base = shared_address(shared);
  asm volatile("" : "+r"(base));
  const u32 group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
  Problem problem = {(u32)M, (u32)N, ceil_div<u32>(K, BLOCK_K), ceil_div<u32>(M, BLOCK_M * CLUSTER),
                     ceil_div<u32>(N, BLOCK_N), 0};
  problem.tiles = problem.tiles_m * problem.tiles_n;
  if (threadIdx.x == CONSUMERS * WARPGROUP) {
    tma_prefetch_map(x_map);
    tma_prefetch_map(weight_map);
    if (STORE_BY_TMA) tma_prefetch_map(out_map);
    for (u32 stage = 0; stage < STAGES; stage++) {
      barrier_init(full_at(base, stage), 1);
      barrier_init(empty_at(base, stage), CLUSTER * CONSUMERS * 4);
    }
    fence_barrier_init();
  }
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();
  wait_for_kernel_ahead();
  if (group == CONSUMERS) {
    drop_registers<24>();
    if (threadIdx.x == CONSUMERS * WARPGROUP) produce(problem, base, x_map, weight_map);
  } else {
    raise_registers<240>();
    consume(problem, base, group, {x_scale, weight_scale, x_row, x_block, weight_row, weight_block},
            bias, out, out_map);
  }
  // A block's barriers and stages outlive the arrivals and copies that its neighbour sends it.
  if constexpr (CLUSTER > 1) cluster_sync();
}
