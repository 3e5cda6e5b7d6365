// Latent attention on Hopper over so few keys that each block has one tile of 64: in clusters whose
// blocks exchange weights, so that they leave fewer sums to be added.
//
// A cluster is BLOCKS blocks of 64 query rows times KEY_BLOCKS tiles of keys. A block makes the
// weights of its rows over its tile, sends them to the blocks of the same rows, and sums its share
// of the columns over all tiles of the cluster. So a row has one part for each cluster, not one for
// each tile, and no block holds more sums than it would alone.
#include "mla_few.h"
#include "mla_softmax.h"
#include "wgmma.h"

constexpr u32 THREADS = 3 * WARPGROUP, KEYS_THREAD = WARPGROUP, QUERIES_THREAD = 2 * WARPGROUP;
constexpr u32 GROUPS = 3, IN_GROUP = (SLABS + 1) / GROUPS;  // of slabs, multiplied as they come
constexpr u32 SHARE_SLABS = SLABS / KEY_BLOCKS;  // of the columns that a block sums
constexpr u32 OTHERS = KEY_BLOCKS - 1;
constexpr u32 SHARE_ROWS = ROWS / KEY_BLOCKS;  // of queries: a block loads them for all of its rows
constexpr u32 TOTALS = ROWS * 8;               // bytes of two numbers a row

// Offsets in shared memory; mla_few.py allocates as much.
constexpr u32 KEYS_AT = TILE, VALUES_AT = 2 * TILE;
constexpr u32 WEIGHTS_AT = VALUES_AT + OTHERS * SHARE_SLABS * SLAB;
constexpr u32 TOTALS_AT = WEIGHTS_AT + OTHERS * SLAB;
constexpr u32 BARRIERS = TOTALS_AT + KEY_BLOCKS * TOTALS;
static_assert(BARRIERS + 8 * (GROUPS + 2 * KEY_BLOCKS) <= 227 * 1024, "a block has so much");

// A block's shared memory at `base`. Tile 0 is the block's own, tile i that of the block of the
// same rows which is i further in the cluster.
struct Memory {
  u32 base;

  __device__ u32 queries(u32 slab) const { return base + slab * SLAB; }
  __device__ u32 keys(u32 slab) const { return base + KEYS_AT + slab * SLAB; }
  // The columns that this block sums, of another tile.
  __device__ u32 values(u32 tile, u32 slab) const {
    return base + VALUES_AT + ((tile - 1) * SHARE_SLABS + slab) * SLAB;
  }
  // The block's own lie in the place of the rotated columns, once there are scores.
  __device__ u32 weights(u32 tile) const {
    return tile == 0 ? keys(SLABS) : base + WEIGHTS_AT + (tile - 1) * SLAB;
  }
  // Of each row the origin of its weights and their sum.
  __device__ u32 totals(u32 tile) const { return base + TOTALS_AT + tile * TOTALS; }
  // Slabs of queries and keys have come; columns of another tile; weights and their sums.
  __device__ u32 loaded(u32 group) const { return base + BARRIERS + group * 8; }
  __device__ u32 valued(u32 tile) const { return loaded(GROUPS) + tile * 8; }
  __device__ u32 weighed(u32 tile) const { return valued(KEY_BLOCKS) + tile * 8; }

  __device__ void init() const {
    for (u32 i = 0; i < GROUPS + 2 * KEY_BLOCKS; i++) barrier_init(loaded(i), 1);
    fence_barrier_init();
    for (u32 i = 0; i < GROUPS; i++) barrier_expect(loaded(i), 2 * IN_GROUP * SLAB);
    for (u32 i = 1; i < KEY_BLOCKS; i++) {
      barrier_expect(valued(i), SHARE_SLABS * SLAB);
      barrier_expect(weighed(i), SLAB + TOTALS);
    }
  }
};

// What a block works on: the tile and the rows that it has in its cluster, and where that is.
struct Place {
  u32 tile, row_block, cluster, group, sequence;

  __device__ u32 rank_of(u32 other_tile) const {
    return (tile + other_tile) % KEY_BLOCKS * BLOCKS + row_block;
  }
  __device__ u32 first_key(u32 other_tile) const {
    return (cluster * KEY_BLOCKS + (tile + other_tile) % KEY_BLOCKS) * KEYS;
  }
};

// A share of the queries of this block's rows, for all blocks of these. Rows beyond the sequence's
// become zeros.
DEVICE void load_queries(const Memory& memory, const Place& at, const TensorMap& latent,
                         const TensorMap& rope) {
  u32 sharers = 0;
  UNROLL for (u32 i = 0; i < KEY_BLOCKS; i++) sharers |= 1u << at.rank_of(i);
  const u32 share = at.tile * SHARE_ROWS, row = (at.group * BLOCKS + at.row_block) * ROWS + share;
  for (u32 i = 0; i <= SLABS; i++)
    tma_load_3d_multicast(memory.queries(i) + share * 128, i < SLABS ? latent : rope,
                          memory.loaded(i / IN_GROUP), i < SLABS ? i * 64 : 0, row, at.sequence,
                          (u16)sharers);
}

// A share of this block's tile, and of its columns of the others, for all blocks of this tile. Keys
// beyond the sequence become zeros.
DEVICE void load_keys(const Memory& memory, const Place& at, const TensorMap& latent,
                      const TensorMap& rotated) {
  const u32 share = at.row_block * SHARE;
  auto load = [&](u32 to, const TensorMap& map, u32 bar, u32 column, u32 tile) {
    const u32 row = at.first_key(tile) + share;
    if constexpr (BLOCKS == 1)
      tma_load_3d(to, map, bar, column, row, at.sequence);
    else
      tma_load_3d_multicast(to + share * 128, map, bar, column, row, at.sequence,
                            (u16)(((1 << BLOCKS) - 1) << at.tile * BLOCKS));
  };
  for (u32 i = 0; i <= SLABS; i++)
    load(memory.keys(i), i < SLABS ? latent : rotated, memory.loaded(i / IN_GROUP),
         i < SLABS ? i * 64 : 0, 0);
  for (u32 i = 1; i < KEY_BLOCKS; i++)
    for (u32 j = 0; j < SHARE_SLABS; j++)
      load(memory.values(i, j), latent, memory.valued(i), (at.tile * SHARE_SLABS + j) * 64, i);
}

DEVICE void multiply_keys(float (&s)[32], const Memory& memory) {
  UNROLL for (u32 i = 0; i <= SLABS; i++) {
    if (i % IN_GROUP == 0) {
      barrier_wait(memory.loaded(i / IN_GROUP), 0);
      wgmma_fence();
    }
    const u64 q = k_major_descriptor(memory.queries(i)), k = k_major_descriptor(memory.keys(i));
    UNROLL for (u32 j = 0; j < 4; j++)
      Wgmma<KEYS>::bf16<false, false>(s, q + j * 2, k + j * 2, i != 0 || j != 0);
    if (i % IN_GROUP == IN_GROUP - 1) wgmma_commit();
  }
  wgmma_wait<0>();
  keep(s);
}

// From shared memory to the same place of block `rank`, whose barrier counts the bytes down.
DEVICE void send(u32 to, u32 from, u32 bytes, u32 bar, u32 rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cluster_address(to, rank)),
      "r"(from), "r"(bytes), "r"(cluster_address(bar, rank))
      : "memory");
}

// The first warpgroup: weights of this block's rows over the `keys` of its tile that there are.
DEVICE void weigh(const Memory& memory, const Place& at, float scale, u32 keys) {
  float s[32];
  u32 p[16];
  multiply_keys(s, memory);
  named_sync(1, WARPGROUP);  // no warp reads the rotated columns any more
  if (keys < KEYS) hide_keys_from(s, keys);
  Softmax softmax = {{LOWEST, LOWEST}, {0.0f, 0.0f}, {1.0f, 1.0f}};
  softmax.add(s, {scale, scale}, p);
  store_weights(p, memory.weights(0));
  UNROLL for (u32 h = 0; h < 2; h++) {
    float total = softmax.total[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const u32 to = memory.totals(0) + (row_of_thread() + h * 8) * 8;
    if (threadIdx.x % 4 != 0) continue;
    store_shared(to, softmax.origin[h]);
    store_shared(to + 4, total);
  }
  fence_shared();
  named_sync(1, WARPGROUP);
  const u32 i = threadIdx.x;
  if (i == 0) barrier_arrive(memory.weighed(0));  // for all, which racecheck does not follow
  if (i != 0 && i < KEY_BLOCKS) {  // to the block that finds this one i further
    const u32 rank = at.rank_of(KEY_BLOCKS - i);
    send(memory.weights(i), memory.weights(0), SLAB, memory.weighed(i), rank);
    send(memory.totals(i), memory.totals(0), TOTALS, memory.weighed(i), rank);
  }
  __syncwarp();
  cluster_arrive_relaxed();
}

// By what sums over each tile are multiplied, for a thread's two rows, and their log2-sum-exp2.
DEVICE void read_factors(float (&factor)[KEY_BLOCKS][2], float (&lse)[2], const Memory& memory) {
  UNROLL for (u32 h = 0; h < 2; h++) {
    float total[KEY_BLOCKS], highest = LOWEST, all = 0.0f;
    UNROLL for (u32 i = 0; i < KEY_BLOCKS; i++) {
      const u32 from = memory.totals(i) + (row_of_thread() + h * 8) * 8;
      factor[i][h] = load_shared(from);
      total[i] = load_shared(from + 4);
      highest = fmaxf(highest, factor[i][h]);
    }
    UNROLL for (u32 i = 0; i < KEY_BLOCKS; i++) {
      factor[i][h] = exp2_approximate(factor[i][h] - highest);
      all = fmaf(factor[i][h], total[i], all);
    }
    const float by = all == 0.0f ? 0.0f : 1.0f / all;
    UNROLL for (u32 i = 0; i < KEY_BLOCKS; i++) factor[i][h] *= by;
    lse[h] = highest + log2f(all);
  }
}

using Sums = float[COLUMNS / 2];

DEVICE void issue_values(Sums& o, u32 weights_at, u32 values_at) {
  const u64 weights = k_major_descriptor(weights_at), values = mn_major_descriptor(values_at, SLAB);
  wgmma_fence();
  UNROLL for (u32 j = 0; j < KEYS / 16; j++)
    Wgmma<COLUMNS>::template bf16<false, true>(o, weights + j * 2, values + j * (2048 >> 4),
                                               j != 0);
  wgmma_commit();
}

// Adds the sums over a tile, once at most PENDING groups of products are under way.
template <u32 PENDING> DEVICE void add(Sums& sums, Sums& o, const float (&factor)[2]) {
  wgmma_wait<PENDING>();
  keep(o);
  UNROLL for (u32 i = 0; i < COLUMNS / 2; i++) sums[i] = fmaf(factor[i / 2 % 2], o[i], sums[i]);
}

// Sums of rows of a cluster that has only a part of their keys.
DEVICE void store_part(const Sums& sums, const float (&lse)[2], const Parts& parts, u32 piece) {
  float factor[2] = {1.0f, 1.0f};
  UNROLL for (u32 h = 0; h < 2; h++) {
    float highest = 0.0f;
    UNROLL for (u32 i = 0; i < COLUMNS / 4; i++)
      highest = fmaxf(highest, fabsf(sums[i / 2 * 4 + 2 * h + i % 2]));
    const float scale = scale_to_fp16(factor[h], highest);
    if (threadIdx.x % 4 == 0)
      parts.scale[piece * ROWS + row_of_thread() + h * 8] = {lse[h], scale};
  }
  uint2* const to = parts.sums + piece * QUADS * WARPGROUP + threadIdx.x % WARPGROUP;
  UNROLL for (u32 j = 0; j < QUADS; j++)
    to[j * WARPGROUP] = {pack_fp16(sums[4 * j] * factor[0], sums[4 * j + 1] * factor[0]),
                         pack_fp16(sums[4 * j + 2] * factor[1], sums[4 * j + 3] * factor[1])};
}

// The other warpgroups: half each of this block's columns, over all tiles of the cluster.
DEVICE void sum(const Memory& memory, const Place& at, const Parts& parts, const Result& out) {
  const u32 half = threadIdx.x / WARPGROUP - 1, slab = half * (COLUMNS / 64);
  Sums o[2], sums = {};
  float factor[KEY_BLOCKS][2], lse[2];
  UNROLL for (u32 i = 0; i < GROUPS; i++) barrier_wait(memory.loaded(i), 0);
  barrier_wait(memory.weighed(0), 0);
  issue_values(o[0], memory.weights(0), memory.keys(at.tile * SHARE_SLABS + slab));
  UNROLL for (u32 i = 1; i < KEY_BLOCKS; i++) {
    barrier_wait(memory.valued(i), 0);
    barrier_wait(memory.weighed(i), 0);
  }
  __syncwarp();
  cluster_arrive_relaxed();
  issue_values(o[1], memory.weights(1), memory.values(1, slab));
  read_factors(factor, lse, memory);
  UNROLL for (u32 i = 0; i < OTHERS; i++) {
    add<1>(sums, o[i % 2], factor[i]);
    if (i + 2 < KEY_BLOCKS)
      issue_values(o[i % 2], memory.weights(i + 2), memory.values(i + 2, slab));
  }
  add<0>(sums, o[OTHERS % 2], factor[OTHERS]);
  const u32 rank = at.rank_of(0);
  if (parts.clusters != 1)
    return store_part(sums, lse, parts, parts.piece(at.sequence, at.group, at.cluster, rank, half));
  UNROLL for (u32 j = 0; j < QUADS; j++)
    out.store(at.sequence, at.group, rank, half, j,
              {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]});
}

// The grid: CLUSTER times the clusters of a sequence, by groups of BLOCKS * 64 rows, by sequences.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    mla_few(const __grid_constant__ TensorMap q_latent, const __grid_constant__ TensorMap q_rope,
            const __grid_constant__ TensorMap latent, const __grid_constant__ TensorMap rotated,
            uint2* sums, float2* scales, u16* out, i64 out_sequence, i64 out_row, float scale,
            int rows, int kv_len) {
  extern __shared__ __align__(1024) u8 bytes[];
  const Memory memory = {shared_address(bytes)};
  const u32 rank = blockIdx.x % CLUSTER;
  const Place at = {rank / BLOCKS, rank % BLOCKS, blockIdx.x / CLUSTER, blockIdx.y, blockIdx.z};
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
  if (threadIdx.x == QUERIES_THREAD) {
    tma_prefetch_map(q_latent);
    tma_prefetch_map(q_rope);
    tma_prefetch_map(latent);
    tma_prefetch_map(rotated);
  }
  if (threadIdx.x == KEYS_THREAD) memory.init();
  __syncwarp();
  cluster_sync();
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  if (threadIdx.x == KEYS_THREAD) load_keys(memory, at, latent, rotated);
  if (threadIdx.x == QUERIES_THREAD) load_queries(memory, at, q_latent, q_rope);
  __syncwarp();
  if (warpgroup == 0) {
    const u32 first = at.first_key(0);
    weigh(memory, at, scale, kv_len > first ? kv_len - first : 0);
  } else {
    const Parts parts = {sums, scales, gridDim.y, gridDim.x / CLUSTER};
    sum(memory, at, parts, {out, out_sequence, out_row, (u32)rows});
  }
  __syncwarp();
  cluster_wait();  // no block may end before what it sent has come
}
