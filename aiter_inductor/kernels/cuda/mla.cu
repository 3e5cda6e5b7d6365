// Latent attention (DeepSeek's MLA with the projections absorbed) on Hopper: 64 query rows of one
// sequence over a part of its cache. For few sequences; mla_clusters.cu is for many.
//
// A block walks over tiles of 32 keys. Its two warpgroups run the same code on different columns:
// each multiplies its half of the 576 columns of the queries, which stay in registers, by the keys,
// adds the other's half of the scores, which comes through shared memory, takes the softmax of all
// of them, and accumulates its half of the 512 output columns from the same tile, whose rows are
// keys and values at once. The scores of the next tile are issued before the products with the
// values of this one, so that exchange and softmax run beside the tensor cores.
#include "barrier.h"
#include "mla.h"
#include "tma.h"
#include "wgmma.h"

constexpr u32 ROWS = 64, KEYS = 32, ROPE = 64;
constexpr u32 THREADS = 2 * WARPGROUP;
constexpr u32 SLAB = KEYS * 128;        // 64 columns of a tile, as TMA lays them out
constexpr u32 LATENT = RANK / 64 * SLAB;  // the latent columns; the rotated slab follows
constexpr u32 TILE = LATENT + SLAB;
constexpr u32 EXCHANGE = THREADS * 64;  // 16 scores a thread
constexpr u32 K_STEPS = RANK / 2 / 16;  // of a warpgroup's half of the latent columns
constexpr u32 ROPE_STEPS = ROPE / 2 / 16;

// Offsets in shared memory; mla.py allocates as much and 1 KiB to align it.
constexpr u32 EXCHANGE_AT = STAGES * TILE, Q_ROPE_AT = EXCHANGE_AT + 2 * EXCHANGE;
constexpr u32 BARRIERS_AT = Q_ROPE_AT + ROWS * ROPE * 2;

constexpr float LOWEST = -1e30f;  // the origin before any score

// Read again where it is needed: a register for it over the main loop would be one too many.
DEVICE u32 thread_in_warpgroup() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % WARPGROUP;
}

// Where a block works.
struct Part {
  u32 row, rows, sequence;  // first query row, query rows of the sequence
  u32 first, tiles;         // first tile of keys and how many
};

// Query or output rows: heads, or heads times new tokens, of each sequence. Strides in elements.
struct Rows {
  u16* start;
  i64 sequence, row;
  __device__ __forceinline__ u16* at(const Part& part, u32 index) const {
    return start + part.sequence * sequence + index * row;
  }
};

DEVICE Part part_of_block(u32 rows, u32 kv_len) {
  const u32 tiles = ceil_div(kv_len, KEYS);
  const u32 first = tiles * blockIdx.y / gridDim.y;
  return {blockIdx.x * ROWS, rows, blockIdx.z, first, tiles * (blockIdx.y + 1) / gridDim.y - first};
}

DEVICE void load_tile(u32 base, u32 index, const Part& part, const TensorMap& latent,
                      const TensorMap& rotated) {
  const u32 stage = index % STAGES, tile = base + stage * TILE;
  const u32 full = base + BARRIERS_AT + stage * 8;
  const int key = (part.first + index) * KEYS;
  barrier_expect(full, TILE);
  tma_load_4d(tile, latent, full, 0, key, 0, part.sequence);
  tma_load_3d(tile + LATENT, rotated, full, 0, key, part.sequence);
}

// This warpgroup's half of the query columns, in the layout of wgmma's A; rows beyond are zeros.
DEVICE void load_queries(u32 (&q)[K_STEPS][4], const Rows& from, const Part& part, u32 half) {
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
  UNROLL for (u32 h = 0; h < 2; h++) {
    const u32 row = part.row + warp * 16 + h * 8 + lane / 4;
    const bool inside = row < part.rows;
    const u16* at = from.at(part, row) + half * (RANK / 2) + lane % 4 * 2;
    UNROLL for (u32 k = 0; k < K_STEPS; k++) {
      q[k][h] = inside ? *(const u32*)(at + k * 16) : 0;
      q[k][h + 2] = inside ? *(const u32*)(at + k * 16 + 8) : 0;
    }
  }
}

DEVICE void store_rotated_queries(u8* to, const Rows& from, const Part& part) {
  UNROLL for (u32 i = threadIdx.x; i < ROWS * 8; i += THREADS) {
    const u32 row = i / 8, chunk = i % 8;
    uint4 x = {0, 0, 0, 0};
    if (part.row + row < part.rows)
      x = *(const uint4*)(from.at(part, part.row + row) + chunk * 8);
    *(uint4*)(to + swizzle_128(row, chunk)) = x;
  }
}

// Issues this warpgroup's half of the scores of a tile.
DEVICE void issue_scores(float (&s)[16], const u32 (&q)[K_STEPS][4], u32 q_rope, u32 tile,
                         u32 half) {
  const u64 keys = k_major_descriptor(tile + half * (LATENT / 2));
  const u64 rotated = k_major_descriptor(tile + LATENT) + half * 4;
  const u64 query = k_major_descriptor(q_rope) + half * 4;
  wgmma_fence();
  UNROLL for (u32 k = 0; k < K_STEPS; k++)
    Wgmma<KEYS>::bf16<false>(s, q[k], keys + k / 4 * (SLAB >> 4) + k % 4 * 2, k != 0);
  UNROLL for (u32 k = 0; k < ROPE_STEPS; k++)
    Wgmma<KEYS>::bf16<false, false>(s, query + k * 2, rotated + k * 2, 1);
  wgmma_commit();
}

// Adds the other warpgroup's half: thread i of both hold the same rows and keys.
DEVICE void add_other_half(float (&s)[16], float4* exchange, u32 half) {
  const u32 thread = thread_in_warpgroup();
  float4* mine = exchange + half * 4 * WARPGROUP + thread;
  const float4* other = exchange + (half ^ 1) * 4 * WARPGROUP + thread;
  UNROLL for (u32 i = 0; i < 4; i++)
    mine[i * WARPGROUP] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
  __syncthreads();
  UNROLL for (u32 i = 0; i < 4; i++) {
    const float4 x = other[i * WARPGROUP];
    s[4 * i] += x.x, s[4 * i + 1] += x.y, s[4 * i + 2] += x.z, s[4 * i + 3] += x.w;
  }
}

// Online softmax of a thread's two rows, in powers of 2; four lanes share a row. The origin of a
// row moves only when a score exceeds it by more than 8: weights stay below 2^8, and the sums
// rarely have to be rescaled.
struct Softmax {
  float origin[2], total[2], decay[2];

  // Turns scores into weights 2^(s scale - origin), packed as wgmma's A; scale is not negative.
  __device__ __forceinline__ void add(const float (&s)[16], float scale, u32 (&p)[2][4]) {
    UNROLL for (u32 h = 0; h < 2; h++) {
      float highest = s[2 * h];
      UNROLL for (u32 i = 1; i < 8; i++) highest = fmaxf(highest, s[i / 2 * 4 + 2 * h + i % 2]);
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      highest *= scale;
      const float moved = highest > origin[h] + 8.0f ? highest : origin[h];
      decay[h] = exp2_approximate(origin[h] - moved);
      origin[h] = moved;
      float sum = 0.0f;
      UNROLL for (u32 j = 0; j < 4; j++) {
        const float a = exp2_approximate(fmaf(s[4 * j + 2 * h], scale, -moved));
        const float b = exp2_approximate(fmaf(s[4 * j + 2 * h + 1], scale, -moved));
        sum += a + b;
        p[j / 2][j % 2 * 2 + h] = pack_bf16(a, b);
      }
      total[h] = total[h] * decay[h] + sum;
    }
  }
};

DEVICE void hide_keys_from(float (&s)[16], u32 end) {
  const u32 lane = thread_in_warpgroup();
  UNROLL for (u32 i = 0; i < 16; i++) {
    const u32 key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (key >= end) s[i] = minus_infinity();
  }
}

// The finished rows: bf16 where this is the only part, else fp32 with their log2-sum-exp2.
DEVICE void store_rows(const float (&o)[128], Softmax& softmax, const Part& part, u32 half,
                       const Rows& out, float* partial, float* lse) {
  const u32 thread = thread_in_warpgroup(), lane = thread % WARP, warp = thread / WARP;
  const u64 num_rows = (u64)gridDim.z * part.rows;
  UNROLL for (u32 h = 0; h < 2; h++) {
    float total = softmax.total[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const u32 in_sequence = part.row + warp * 16 + h * 8 + lane / 4;
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    const u64 row = (u64)part.sequence * part.rows + in_sequence;
    const u32 column = half * (RANK / 2) + lane % 4 * 2;
    if (in_sequence < part.rows) {
      if (gridDim.y == 1) {
        u16* to = out.at(part, in_sequence) + column;
        UNROLL for (u32 j = 0; j < 32; j++)
          *(u32*)(to + j * 8) =
              pack_bf16(o[4 * j + 2 * h] * factor, o[4 * j + 2 * h + 1] * factor);
      } else {
        const u64 at = blockIdx.y * num_rows + row;
        UNROLL for (u32 j = 0; j < 32; j++)
          *(float2*)(partial + at * RANK + column + j * 8) = {o[4 * j + 2 * h] * factor,
                                                              o[4 * j + 2 * h + 1] * factor};
        if (half == 0 && lane % 4 == 0) lse[at] = softmax.origin[h] + log2f(total);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mla_attend(const __grid_constant__ TensorMap latent, const __grid_constant__ TensorMap rotated,
               u16* q_latent, i64 q_latent_sequence, i64 q_latent_row, u16* q_rope,
               i64 q_rope_sequence, i64 q_rope_row, u16* out, i64 out_sequence, i64 out_row,
               float* partial, float* lse, float scale, int rows, int kv_len) {
  extern __shared__ u8 unaligned[];
  u8* shared = unaligned + (-shared_address(unaligned) & 1023);
  const u32 base = shared_address(shared), barriers = base + BARRIERS_AT;
  const u32 half = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
  const Part part = part_of_block(rows, kv_len);
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < STAGES; stage++) {
      barrier_init(barriers + stage * 8, 1);
    }
    fence_barrier_init();
    for (u32 i = 0; i < STAGES && i < part.tiles; i++) load_tile(base, i, part, latent, rotated);
  }
  u32 q[K_STEPS][4];
  load_queries(q, {q_latent, q_latent_sequence, q_latent_row}, part, half);
  store_rotated_queries(shared + Q_ROPE_AT, {q_rope, q_rope_sequence, q_rope_row}, part);
  fence_shared();
  __syncthreads();

  Softmax softmax = {{LOWEST, LOWEST}, {0.0f, 0.0f}, {1.0f, 1.0f}};
  float o[128], s[16];
  UNROLL for (u32 i = 0; i < 128; i++) o[i] = 0.0f;
  keep(o);
  auto issue_scores_of = [&](u32 i) {
    barrier_wait(barriers + i % STAGES * 8, i / STAGES & 1);
    issue_scores(s, q, base + Q_ROPE_AT, base + i % STAGES * TILE, half);
  };
  // Finished halves of the scores of tile i to weights.
  auto weigh = [&](u32 i, u32 (&p)[2][4]) {
    keep(s);
    add_other_half(s, (float4*)(shared + EXCHANGE_AT + i % 2 * EXCHANGE), half);
    // Both warpgroups are done with tile i - 2, whose place the tile STAGES further takes.
    if (threadIdx.x == 0 && i >= 2 && i - 2 + STAGES < part.tiles)
      load_tile(base, i - 2 + STAGES, part, latent, rotated);
    if (i + 1 == part.tiles) hide_keys_from(s, kv_len - (part.first + i) * KEYS);
    softmax.add(s, scale, p);
  };
  // The sums before tile i, decayed where its scores are much higher than those before.
  auto decay = [&]() {
    if (__any_sync(~0u, softmax.decay[0] != 1.0f || softmax.decay[1] != 1.0f)) {
      wgmma_wait<0>();
      keep(s);
      keep(o);
      UNROLL for (u32 j = 0; j < 128; j++) o[j] *= softmax.decay[j / 2 % 2];
      keep(o);
    }
  };
  auto issue_values = [&](u32 i, const u32 (&p)[2][4]) {
    wgmma_fence();
    const u32 tile = base + i % STAGES * TILE;
    const u64 values = mn_major_descriptor(tile + half * (LATENT / 2), SLAB);
    UNROLL for (u32 k = 0; k < KEYS / 16; k++)
      Wgmma<RANK / 2>::bf16<true>(o, p[k], values + k * (2048 >> 4), 1);
    wgmma_commit();
  };
  // Weights of tile i, of which there is a next, to those of tile i + 1. They lie in other
  // registers, because the products that read the former are still under way.
  auto step = [&](u32 i, const u32 (&p)[2][4], u32 (&next)[2][4]) {
    issue_scores_of(i + 1);
    wgmma_wait<1>();
    decay();
    issue_values(i, p);
    wgmma_wait<1>();
    weigh(i + 1, next);
  };
  if (part.tiles != 0) {
    u32 even[2][4], odd[2][4], i = 0;
    issue_scores_of(0);
    wgmma_wait<0>();
    weigh(0, even);
    for (; i + 2 < part.tiles; i += 2) {
      step(i, even, odd);
      step(i + 1, odd, even);
    }
    if (i + 1 < part.tiles) {
      step(i, even, odd);
      wgmma_wait<0>();
      decay();
      issue_values(i + 1, odd);
    } else {
      wgmma_wait<0>();
      decay();
      issue_values(i, even);
    }
    wgmma_wait<0>();
    keep(o);
  }
  store_rows(o, softmax, part, half, {out, out_sequence, out_row}, partial, lse);
}
