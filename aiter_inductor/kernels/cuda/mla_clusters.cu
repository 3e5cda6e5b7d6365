// Latent attention (DeepSeek's MLA with the projections absorbed) on Hopper: 64 query rows of one
// sequence over a part of its cache, in clusters of blocks that share the keys.
//
// A block walks over tiles of 64 keys, whose rows are keys and values at once. One warpgroup holds
// the queries in registers, multiplies them by the keys, and takes the softmax; the two others hold
// the sums, 256 columns each, and multiply the weights, which they read from shared memory, by the
// values. They do so when the scores of the next tile are finished: the tensor cores multiply
// weights by values while the softmax of the next tile is taken, and nobody waits for anybody long.
//
// A cluster is BLOCKS blocks of query rows, which receive every tile together (each loads a share
// for all), times PARTS parts of the cache, whose sums are added through distributed shared memory.
// The rows of a sequence lie one after the other, or, where PAGE is not 0, in pages of so many.
#include "mla.h"
#include "ring.h"
#include "tma.h"
#include "wgmma.h"

constexpr u32 ROWS = 64, KEYS = 64, ROPE = 64;
constexpr u32 THREADS = 3 * WARPGROUP;
constexpr u32 PLACES = 3;                 // tiles in shared memory
constexpr u32 SLABS = RANK / 64;          // of 64 columns, as TMA lays them out
constexpr u32 SLAB = KEYS * 128;
constexpr u32 TILE = (SLABS + 1) * SLAB;  // latent slabs and the rotated one
constexpr u32 STEPS = (RANK + ROPE) / 16;
constexpr u32 STEPS_SHARED = 5;  // steps of 16 query columns that find no registers

// Offsets in shared memory; mla_clusters.py allocates as much.
constexpr u32 QUERIES_AT = PLACES * TILE;  // STEPS_SHARED steps of the queries
constexpr u32 DECAY_AT = QUERIES_AT + SLAB + ROWS * 32, BARRIERS_AT = DECAY_AT + 2 * ROWS * 4;

// In the place of the tiles in the end: for each part, the sums of this block's columns.
constexpr u32 WIDTH = ceil_div(RANK / 8, (u32)PARTS) * 8;  // the last part has fewer
constexpr u32 SUMS_ROW = (WIDTH / 32 * 32 + 40) * 4;  // 8 modulo 32: no bank conflicts
constexpr u32 SUMS = ROWS * SUMS_ROW, STATISTICS_AT = PARTS * SUMS;
static_assert(STATISTICS_AT + PARTS * ROWS * 8 <= QUERIES_AT, "the sums take the tiles' place");

constexpr float LOWEST = -1e30f;  // the origin before any score

using KeyRing = Ring<PLACES, 2 * 4 * BLOCKS>;

// Read again where it is needed: addresses that are made from it before the main loop, to last over
// it, would not leave enough registers for the queries.
DEVICE u32 thread_in_block() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Where a block works: on `tiles` of KEYS keys from the tile `first` on, of a sequence of kv_len.
struct Part {
  u32 row, rows, sequence;  // first query row, query rows of the sequence
  u32 kv_len, first, tiles;
  bool whole;  // one cluster works on the sequence
};

// A cluster works on `chunk` tiles, fewer in the end.
DEVICE Part part_of_block(u32 rows, u32 kv_len, u32 chunk) {
  const u32 all = ceil_div(kv_len, KEYS), mine = blockIdx.y % PARTS;
  const u32 begin = min(blockIdx.y / PARTS * chunk, all), tiles = min(chunk, all - begin);
  const u32 first = tiles * mine / PARTS, end = tiles * (mine + 1) / PARTS;
  return {blockIdx.x * ROWS, rows, blockIdx.z, kv_len, begin + first, end - first, all <= chunk};
}

// The pages of every sequence in order; null where there are none.
struct Tables {
  const int* pages;
  i64 sequence;
};

// A block's shared memory at `base`. Barriers come in pairs for even and odd tiles.
struct Shared {
  u32 base;

  __device__ u32 tile(u32 place) const { return base + place * TILE; }
  // Its last slab: the rotated columns, in whose place the weights lie once there are scores.
  __device__ u32 rotated(u32 place) const { return tile(place) + SLABS * SLAB; }
  __device__ u32 queries() const { return base + QUERIES_AT; }
  __device__ u32 decay(u32 tile) const { return base + DECAY_AT + tile % 2 * ROWS * 4; }
  __device__ KeyRing ring() const { return KeyRing(base + BARRIERS_AT); }
  // The scores of a tile are finished; its weights are stored.
  __device__ u32 scored(u32 tile) const { return barrier(0, tile); }
  __device__ u32 weighed(u32 tile) const { return barrier(2, tile); }
  __device__ u32 barrier(u32 first, u32 tile) const {
    return base + BARRIERS_AT + KeyRing::BYTES + (first + tile % 2) * 8;
  }
  __device__ void init() const {
    ring().init();
    for (u32 i = 0; i < 2; i++) {
      barrier_init(scored(i), 4);
      barrier_init(weighed(i), 4);
    }
    fence_barrier_init();
  }
};

DEVICE u32 parity_of(u32 tile) { return tile / 2 % 2; }

// The first of the cluster's blocks that share this block's keys.
DEVICE u32 first_sharer() { return cluster_rank() / BLOCKS * BLOCKS; }

// Each warp arrives `times` at the barrier of every block that shares the keys.
DEVICE void release_to_sharers(u32 empty, u32 times) {
  __syncwarp();
  const u32 lane = threadIdx.x % WARP;
  if (lane < BLOCKS * times) barrier_arrive_remote(empty, first_sharer() + lane % BLOCKS);
}

// The queries are the first item of the ring, tile i the item i + 1.
DEVICE void load_queries(const Shared& shared, const KeyRing& ring, const Part& part,
                         const TensorMap& latent, const TensorMap& rotated) {
  barrier_expect(ring.full(), TILE);
  for (u32 i = 0; i < SLABS; i++)
    tma_load_3d(i == 0 ? shared.queries() : shared.tile(0) + i * SLAB, latent, ring.full(), i * 64,
                part.row, part.sequence);
  tma_load_3d(shared.rotated(0), rotated, ring.full(), 0, part.row, part.sequence);
}

// Where keys of a tile lie: coordinates of TMA. There is no page -1, which TMA fills with zeros.
struct Place {
  int row, outer;
};

DEVICE Place place_of(u32 key, const Part& part, const Tables& tables) {
  if constexpr (PAGE == 0) return {(int)key, (int)part.sequence};
  constexpr u32 SIZE = PAGE != 0 ? PAGE : KEYS;
  const bool inside = key < part.kv_len;
  const i64 at = part.sequence * tables.sequence + key / SIZE;
  return {(int)(key % SIZE), inside ? tables.pages[at] : -1};
}

// This block's share of a tile, for all that share it. Keys beyond the sequence become zeros,
// except those of a page that it ends in.
DEVICE void load_tile(const Shared& shared, const KeyRing& ring, u32 tile, const Part& part,
                      const TensorMap& latent, const TensorMap& rotated, const Tables& tables) {
  constexpr u32 SHARE = KEYS / BLOCKS, RUN = PAGE != 0 && PAGE < SHARE ? PAGE : SHARE;
  const u32 share = BLOCKS > 1 ? blockIdx.x % BLOCKS : 0, full = ring.full();
  const int first_rotated = PAGE != 0 ? RANK : 0;
  const u16 sharers = ((1 << BLOCKS) - 1) << first_sharer();
  barrier_expect(full, TILE);
  UNROLL for (u32 run = 0; run < SHARE; run += RUN) {
    const u32 key = (part.first + tile) * KEYS + share * SHARE + run;
    const u32 to = shared.tile(ring.place) + (share * SHARE + run) * 128;
    const Place at = place_of(key, part, tables);
    for (u32 i = 0; i <= SLABS; i++) {
      const TensorMap& map = i < SLABS ? latent : rotated;
      const int column = i < SLABS ? i * 64 : first_rotated;
      if constexpr (BLOCKS == 1)
        tma_load_3d(to + i * SLAB, map, full, column, at.row, at.outer);
      else
        tma_load_3d_multicast(to + i * SLAB, map, full, column, at.row, at.outer, sharers);
    }
  }
}

// The queries in the layout of wgmma's A: the first slab stays in shared memory, and one step more
// is stored behind it, as 8 x 16 bytes one after the other; the rotated columns come last.
DEVICE void read_queries(u32 (&q)[STEPS - STEPS_SHARED][4], const Shared& shared) {
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const u32 row = warp * 16 + lane % 16, chunk = lane / 16;
  u32 fifth[4];
  ldmatrix_x4(fifth, shared.tile(0) + SLAB + swizzle_128(row, chunk));
  stmatrix_x4(shared.queries() + SLAB + (row / 8 * 2 + chunk) * 128 + row % 8 * 16, fifth[0],
              fifth[1], fifth[2], fifth[3]);
  UNROLL for (u32 k = STEPS_SHARED; k < STEPS; k++) {
    const u32 slab = shared.tile(0) + k / 4 * SLAB;
    ldmatrix_x4(q[k - STEPS_SHARED], slab + swizzle_128(row, k % 4 * 2 + chunk));
  }
  fence_shared();
  named_sync(1, WARPGROUP);
}

DEVICE void issue_scores(float (&s)[32], const u32 (&q)[STEPS - STEPS_SHARED][4], u32 queries,
                         u32 tile) {
  const u64 first = k_major_descriptor(queries), keys = k_major_descriptor(tile);
  const u64 fifth = core_matrices_descriptor(queries + SLAB, 128, 256);
  wgmma_fence();
  UNROLL for (u32 k = 0; k < STEPS; k++) {
    const u64 key = keys + k / 4 * (SLAB >> 4) + k % 4 * 2;
    if (k < STEPS_SHARED)
      Wgmma<KEYS>::bf16<false, false>(s, k < 4 ? first + k * 2 : fifth, key, k != 0);
    else
      Wgmma<KEYS>::bf16<false>(s, q[k - STEPS_SHARED], key, 1);
  }
  wgmma_commit();
}

DEVICE void hide_keys_from(float (&s)[32], u32 end) {
  const u32 lane = thread_in_block() % WARP;
  UNROLL for (u32 i = 0; i < 32; i++) {
    const u32 key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (key >= end) s[i] = minus_infinity();
  }
}

// Online softmax of a thread's two rows, in powers of 2; four lanes share a row. The origin of a
// row moves only when a score exceeds it by more than 8: weights stay below 2^8, and the sums
// rarely have to be rescaled.
struct Softmax {
  float origin[2], total[2], decay[2];

  // Turns scores into weights 2^(s scale - origin), in pairs; scale is not negative.
  __device__ __forceinline__ void add(const float (&s)[32], float scale, u32 (&p)[16]) {
    float highest[2];
    UNROLL for (u32 h = 0; h < 2; h++) {
      float by_four[4];
      UNROLL for (u32 i = 0; i < 4; i++) by_four[i] = s[i / 2 * 4 + 2 * h + i % 2];
      UNROLL for (u32 i = 4; i < 16; i++)
        by_four[i % 4] = fmaxf(by_four[i % 4], s[i / 2 * 4 + 2 * h + i % 2]);
      highest[h] = fmaxf(fmaxf(by_four[0], by_four[1]), fmaxf(by_four[2], by_four[3])) * scale;
      decay[h] = 1.0f;
    }
    if (__any_sync(~0u, highest[0] > origin[0] + 8.0f || highest[1] > origin[1] + 8.0f)) {
      UNROLL for (u32 h = 0; h < 2; h++) {
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 1));
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 2));
        const float moved = highest[h] > origin[h] + 8.0f ? highest[h] : origin[h];
        decay[h] = exp2_approximate(origin[h] - moved);
        origin[h] = moved;
        total[h] *= decay[h];
      }
    }
    UNROLL for (u32 h = 0; h < 2; h++) {
      float sums[2] = {total[h], 0.0f};
      UNROLL for (u32 j = 0; j < 8; j++) {
        const float a = exp2_approximate(fmaf(s[4 * j + 2 * h], scale, -origin[h]));
        const float b = exp2_approximate(fmaf(s[4 * j + 2 * h + 1], scale, -origin[h]));
        sums[0] += a, sums[1] += b;
        p[2 * j + h] = pack_bf16(a, b);
      }
      total[h] = sums[0] + sums[1];
    }
  }
};

// Zeros for the keys from `end` on: a page may hold anything there, which no weight of 0 hides.
DEVICE void clear_keys_from(u32 tile, u32 end) {
  for (u32 i = end * SLABS * 8 + thread_in_block(); i < KEYS * SLABS * 8; i += WARPGROUP) {
    const u32 to = tile + i / 8 % SLABS * SLAB + i / 8 / SLABS * 128 + i % 8 * 16;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }
}

// Stores the weights as wgmma's A, and by how much the sums before this tile decay.
DEVICE void store_weights(const u32 (&p)[16], const Softmax& softmax, u32 weights, u32 decay) {
  const u32 thread = thread_in_block(), lane = thread % WARP, warp = thread / WARP;
  UNROLL for (u32 j = 0; j < 4; j++) {
    const u32 to = weights + swizzle_128(warp * 16 + lane % 16, j * 2 + lane / 16);
    stmatrix_x4(to, p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
  }
  UNROLL for (u32 h = 0; h < 2; h++)
    if (lane % 4 == 0)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(decay + (warp * 16 + h * 8 + lane / 4) * 4),
                   "f"(softmax.decay[h])
                   : "memory");
}

// The first warpgroup: scores and weights of every tile. Returns its rows' origins and totals.
DEVICE Softmax weigh(const Shared& shared, const Part& part, float scale) {
  KeyRing ring = shared.ring();
  u32 q[STEPS - STEPS_SHARED][4];
  ring.wait_full();
  read_queries(q, shared);
  release_to_sharers(ring.empty(), 2);
  Softmax softmax = {{LOWEST, LOWEST}, {0.0f, 0.0f}, {1.0f, 1.0f}};
  for (u32 tile = 0; tile < part.tiles; tile++) {
    float s[32];
    u32 p[16];
    ring.next();
    ring.wait_full();
    issue_scores(s, q, shared.queries(), shared.tile(ring.place));
    wgmma_wait<0>();
    keep(s);
    release(shared.scored(tile));
    if (tile + 1 == part.tiles) hide_keys_from(s, part.kv_len - (part.first + tile) * KEYS);
    softmax.add(s, scale, p);
    barrier_wait(shared.scored(tile), parity_of(tile));  // no warp reads the tile any more
    if (PAGE != 0 && tile + 1 == part.tiles)
      clear_keys_from(shared.tile(ring.place), part.kv_len - (part.first + tile) * KEYS);
    store_weights(p, softmax, shared.rotated(ring.place), shared.decay(tile));
    fence_shared();
    release(shared.weighed(tile));
  }
  UNROLL for (u32 h = 0; h < 2; h++) {
    softmax.total[h] += __shfl_xor_sync(~0u, softmax.total[h], 1);
    softmax.total[h] += __shfl_xor_sync(~0u, softmax.total[h], 2);
  }
  return softmax;
}

DEVICE void decay_sums(float (&o)[128], u32 decay) {
  const u32 row = threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
  float by[2];
  UNROLL for (u32 h = 0; h < 2; h++)
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(by[h]) : "r"(decay + (row + h * 8) * 4) : "memory");
  if (!__any_sync(~0u, by[0] != 1.0f || by[1] != 1.0f)) return;
  keep(o);
  UNROLL for (u32 j = 0; j < 128; j++) o[j] *= by[j / 2 % 2];
  keep(o);
}

// The other warpgroups: half of the sums each. One thread, `loads`, loads the third tile on.
DEVICE void sum(float (&o)[128], const Shared& shared, const Part& part, u32 half, bool loads,
                const TensorMap& latent, const TensorMap& rotated, const Tables& tables) {
  KeyRing ring = shared.ring();
  for (u32 tile = 0; tile < part.tiles; tile++) {
    const KeyRing before = ring;
    ring.next();
    barrier_wait(shared.weighed(tile), parity_of(tile));
    ring.wait_full();
    if (tile != 0) decay_sums(o, shared.decay(tile));
    if (loads && tile + 2 < part.tiles) {
      barrier_wait(before.empty(), before.parity);
      load_tile(shared, before, tile + 2, part, latent, rotated, tables);
    }
    __syncwarp();
    if (tile + 1 < part.tiles) barrier_wait(shared.scored(tile + 1), parity_of(tile + 1));
    const u64 weights = k_major_descriptor(shared.rotated(ring.place));
    const u64 values =
        mn_major_descriptor(shared.tile(ring.place) + half * (SLABS / 2 * SLAB), SLAB);
    wgmma_fence();
    UNROLL for (u32 k = 0; k < KEYS / 16; k++)
      Wgmma<RANK / 2>::bf16<false, true>(o, weights + k * 2, values + k * (2048 >> 4),
                                         tile != 0 || k != 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep(o);
    release_to_sharers(ring.empty(), 1);
  }
}

// Hands each part of the cluster its columns of these sums, next to those of the other parts.
template <u32 HALF> DEVICE void hand_out_sums(const float (&o)[128], u32 base) {
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
  const u32 mine = cluster_rank() / BLOCKS, sharer = cluster_rank() % BLOCKS;
  const u32 at = base + mine * SUMS + (warp * 16 + lane / 4) * SUMS_ROW + lane % 4 * 8;
  u32 to = 0;
  UNROLL for (u32 j = 0; j < RANK / 2 / 8; j++) {
    const u32 column = HALF * (RANK / 2) + j * 8;
    if (j == 0 || column % WIDTH == 0) to = cluster_address(at, column / WIDTH * BLOCKS + sharer);
    UNROLL for (u32 h = 0; h < 2; h++)
      st_cluster(to + column % WIDTH * 4 + h * 8 * SUMS_ROW, o[4 * j + 2 * h], o[4 * j + 2 * h + 1]);
  }
}

DEVICE void hand_out_statistics(const Softmax& softmax, u32 base) {
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const u32 mine = cluster_rank() / BLOCKS, sharer = cluster_rank() % BLOCKS;
  const u32 at = base + STATISTICS_AT + (mine * ROWS + warp * 16 + lane / 4) * 8;
  for (u32 part = lane % 4; part < PARTS; part += 4)
    UNROLL for (u32 h = 0; h < 2; h++)
      st_cluster(cluster_address(at + h * 64, part * BLOCKS + sharer), softmax.origin[h],
                 softmax.total[h]);
}

// Query or output rows: heads, or heads times new tokens, of each sequence. Strides in elements.
struct Rows {
  u16* start;
  i64 sequence, row;
};

// Adds the parts, and stores this block's columns: bf16 where no other cluster works on the
// sequence, else fp32 with their log2-sum-exp2.
DEVICE void store_rows(const u8* shared, const Part& part, const Rows& out, float* partial,
                       float* lse) {
  constexpr u32 CHUNKS = WIDTH / 4;
  const u32 columns = cluster_rank() / BLOCKS * WIDTH;
  for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const u32 row = i / CHUNKS, chunk = i % CHUNKS;
    if (part.row + row >= part.rows) break;
    if (columns + chunk * 4 >= RANK) continue;
    const float2* statistics = (const float2*)(shared + STATISTICS_AT) + row;
    float highest = LOWEST, total = 0.0f;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL for (u32 j = 0; j < PARTS; j++) highest = fmaxf(highest, statistics[j * ROWS].x);
    UNROLL for (u32 j = 0; j < PARTS; j++) {
      const float weight = exp2_approximate(statistics[j * ROWS].x - highest);
      const float4 x = *(const float4*)(shared + j * SUMS + row * SUMS_ROW + chunk * 16);
      total += weight * statistics[j * ROWS].y;
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
    if (part.whole) {
      u16* to = out.start + part.sequence * out.sequence + (part.row + row) * out.row + columns;
      ((uint2*)to)[chunk] = {pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w)};
    } else {
      const u64 num_rows = (u64)gridDim.z * part.rows;
      const u64 at = blockIdx.y / PARTS * num_rows + (u64)part.sequence * part.rows + part.row + row;
      *(float4*)(partial + at * RANK + columns + chunk * 4) = sum;
      if (columns + chunk == 0) lse[at] = highest + log2f(total);
    }
  }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, PARTS, 1) __launch_bounds__(THREADS, 1)
    mla_attend_clusters(const __grid_constant__ TensorMap q_latent,
                        const __grid_constant__ TensorMap q_rope,
                        const __grid_constant__ TensorMap latent,
                        const __grid_constant__ TensorMap rotated, const int* pages,
                        i64 pages_sequence, const int* lengths, u16* out, i64 out_sequence,
                        i64 out_row, float* partial, float* lse, float scale, int rows, int kv_len,
                        int chunk) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared = {shared_address(memory)};
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
  const bool loads = threadIdx.x == WARPGROUP;
  if (loads) {
    shared.init();
    tma_prefetch_map(q_latent);
    tma_prefetch_map(q_rope);
    tma_prefetch_map(latent);
    tma_prefetch_map(rotated);
  }
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const Part part = part_of_block(rows, lengths ? lengths[blockIdx.z] : kv_len, chunk);
  if (blockIdx.y / PARTS * chunk * KEYS >= part.kv_len && blockIdx.y >= PARTS) return;
  const Tables tables = {pages, pages_sequence};
  if (loads) load_queries(shared, shared.ring(), part, q_latent, q_rope);
  cluster_sync();
  if (loads) {
    KeyRing ring = shared.ring();
    for (u32 tile = 0; tile < 2 && tile < part.tiles; tile++) {
      ring.next();
      load_tile(shared, ring, tile, part, latent, rotated, tables);
    }
  }
  if (warpgroup == 0) {
    raise_registers<184>();
    const Softmax softmax = weigh(shared, part, scale);
    cluster_sync();
    hand_out_statistics(softmax, shared.base);
  } else {
    drop_registers<160>();
    float o[128];
    UNROLL for (u32 i = 0; i < 128; i++) o[i] = 0.0f;
    sum(o, shared, part, warpgroup - 1, loads, latent, rotated, tables);
    cluster_sync();
    if (warpgroup == 1)
      hand_out_sums<0>(o, shared.base);
    else
      hand_out_sums<1>(o, shared.base);
  }
  cluster_sync();
  store_rows(memory, part, {out, out_sequence, out_row}, partial, lse);
}
