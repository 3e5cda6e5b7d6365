// Latent attention (DeepSeek's MLA with the projections absorbed) on Hopper: 64 query rows of a
// sequence over its cache or a part of it, in clusters of blocks that share the keys.
//
// A block walks over tiles of 64 keys, whose rows are keys and values at once. One warpgroup holds
// the queries in registers, multiplies them by the keys, and takes the softmax; the two others hold
// the sums, 256 columns each, and multiply the weights, which they read from shared memory, by the
// values. They do so when the scores of the next tile are finished: the tensor cores multiply
// weights by values while the softmax of the next tile is taken, and nobody waits for anybody long.
//
// A cluster is BLOCKS blocks of query rows, which receive every tile together: each loads a share
// for all. It works on one piece of the schedule after the other; the next one's queries and first
// tile are loaded, and its first weights made, while the rows of the last one are stored. The rows
// of a sequence lie one after the other, or, where PAGE is not 0, in pages of so many.
#include "mla_fp8.h"
#include "mla_load.h"
#include "mla_rows.h"
#include "mla_softmax.h"
#include "wgmma.h"

constexpr u32 THREADS = 3 * WARPGROUP;

// The queries in the layout of wgmma's A: the first slab stays in shared memory, and one step more
// is stored behind it, as 8 x 16 bytes one after the other; the rotated columns come last. For rows
// of e4m3 they become fp16, and `scale` that of each of a thread's two rows.
DEVICE void read_queries(u32 (&q)[STEPS - STEPS_SHARED][4], float (&scale)[2], const Shared& shared,
                         u32 place) {
  const u32 thread = thread_in_block(), lane = thread % WARP, warp = thread / WARP;
  const u32 row = warp * 16 + lane % 16, chunk = lane / 16;
  if (FP8) queries_to_fp16(scale, shared, place);
  u32 fifth[4];
  ldmatrix_x4(fifth, shared.tile(place) + SLAB + swizzle_128(row, chunk));
  stmatrix_x4(shared.queries() + SLAB + (row / 8 * 2 + chunk) * 128 + row % 8 * 16, fifth[0],
              fifth[1], fifth[2], fifth[3]);
  UNROLL for (u32 k = STEPS_SHARED; k < STEPS; k++) {
    const u32 slab = shared.tile(place) + k / 4 * SLAB;
    ldmatrix_x4(q[k - STEPS_SHARED], slab + swizzle_128(row, k % 4 * 2 + chunk));
  }
  fence_shared();
  named_sync(1, WARPGROUP);
}

// Products of bf16, or of fp16 for rows of e4m3.
template <u32 N, bool VALUES, u32 R> DEVICE void multiply(float (&d)[R], u64 a, u64 b, u32 add) {
  if constexpr (FP8)
    Wgmma<N>::template fp16<false, VALUES>(d, a, b, add);
  else
    Wgmma<N>::template bf16<false, VALUES>(d, a, b, add);
}
template <u32 N, u32 R> DEVICE void multiply(float (&d)[R], const u32 (&a)[4], u64 b, u32 add) {
  if constexpr (FP8)
    Wgmma<N>::template fp16<false>(d, a, b, add);
  else
    Wgmma<N>::template bf16<false>(d, a, b, add);
}

DEVICE void issue_scores(float (&s)[32], const u32 (&q)[STEPS - STEPS_SHARED][4], u32 queries,
                         u32 tile) {
  const u64 first = k_major_descriptor(queries), keys = k_major_descriptor(tile);
  const u64 fifth = core_matrices_descriptor(queries + SLAB, 128, 256);
  wgmma_fence();
  UNROLL for (u32 k = 0; k < STEPS; k++) {
    const u64 key = keys + k / 4 * (SLAB >> 4) + k % 4 * 2;
    if (k < STEPS_SHARED)
      multiply<KEYS, false>(s, k < 4 ? first + k * 2 : fifth, key, k != 0);
    else
      multiply<KEYS>(s, q[k - STEPS_SHARED], key, 1);
  }
  wgmma_commit();
}

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
  store_weights(p, weights);
  UNROLL for (u32 h = 0; h < 2; h++)
    if (lane % 4 == 0) store_shared(decay + (warp * 16 + h * 8 + lane / 4) * 4, softmax.decay[h]);
}

// The factors of the finished sums, and of a cut sequence the rows' log2-sum-exp2.
DEVICE void finish(Softmax& softmax, float kv_scale, const Shared& shared, const Turn& turn,
                   u32 slot, const Outputs& outputs) {
  const u32 thread = thread_in_block(), lane = thread % WARP, warp = thread / WARP;
  UNROLL for (u32 h = 0; h < 2; h++) {
    float total = softmax.total[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane % 4 != 0) continue;
    const u32 row = warp * 16 + h * 8 + lane / 4;
    store_shared(shared.factors(turn) + row * 4, total == 0.0f ? 0.0f : kv_scale / total);
    if (slot != WHOLE)
      outputs.sums.lse[outputs.sums.row(slot, outputs.slots, row)] =
          softmax.origin[h] + log2f(total);
  }
}

// By what rows of e4m3 are multiplied; null is 1.
DEVICE float row_scale(const float* kv_scale) { return FP8 && kv_scale ? *kv_scale : 1.0f; }

// More than KEYS where the sequence goes on.
DEVICE u32 keys_of_last_tile(const Piece& piece) {
  return piece.kv_len - (piece.first + piece.tiles - 1) * KEYS;
}

// The first warpgroup: scores and weights of every tile.
DEVICE void weigh(const Shared& shared, float scale, const float* kv_scale,
                  const Outputs& outputs) {
  KeyRing ring = shared.ring();
  Turn turn;
  for (u32 number = 0;; number++) {
    ring.wait_full();
    const Piece& piece = shared.loader().pieces[number % 2];
    if (piece.tiles == 0) break;
    u32 q[STEPS - STEPS_SHARED][4];
    float scales[2] = {scale * row_scale(kv_scale), scale * row_scale(kv_scale)};
    read_queries(q, scales, shared, ring.place);
    release_to_sharers(ring.empty());
    Softmax softmax = {{LOWEST, LOWEST}, {0.0f, 0.0f}, {1.0f, 1.0f}};
    for (u32 left = piece.tiles; left != 0; left--) {
      float s[32];
      u32 p[16];
      ring.next();
      if (FP8)
        barrier_wait(shared.ready(ring), ring.parity);
      else
        ring.wait_full();
      issue_scores(s, q, shared.queries(), shared.tile(ring.place));
      wgmma_wait<0>();
      keep(s);
      release(shared.scored(turn));
      if (left == 1) hide_keys_from(s, keys_of_last_tile(piece));
      softmax.add(s, scales, p);
      barrier_wait(shared.scored(turn), turn.parity);  // no warp reads the tile any more
      if (PAGE != 0 && left == 1)
        clear_keys_from(shared.tile(ring.place), keys_of_last_tile(piece));
      store_weights(p, softmax, shared.rotated(ring.place), shared.factors(turn));
      fence_shared();
      release(shared.weighed(turn));
      release_to_sharers(ring.empty());
      turn.next();
    }
    ring.next();
    ring.wait_empty();  // the others are done with what was there, and so with these barriers
    release(shared.scored(turn));
    finish(softmax, row_scale(kv_scale), shared, turn, piece.slot, outputs);
    release(shared.weighed(turn));
    turn.next();
    release_to_sharers(ring.empty());
    ring.next();
  }
}

DEVICE void decay_sums(float (&o)[128], u32 factors) {
  float by[2];
  UNROLL for (u32 h = 0; h < 2; h++) by[h] = load_shared(factors + (row_of_thread() + h * 8) * 4);
  if (!__any_sync(~0u, by[0] != 1.0f || by[1] != 1.0f)) return;
  keep(o);
  UNROLL for (u32 j = 0; j < 128; j++) o[j] *= by[j / 2 % 2];
  keep(o);
}

DEVICE void issue_values(float (&o)[128], u32 weights_at, u32 values_at, bool first) {
  const u64 weights = k_major_descriptor(weights_at), values = mn_major_descriptor(values_at, SLAB);
  wgmma_fence();
  UNROLL for (u32 k = 0; k < KEYS / 16; k++)
    multiply<RANK / 2, true>(o, weights + k * 2, values + k * (2048 >> 4), !first || k != 0);
  wgmma_commit();
}

// The other warpgroups: half of the sums each. One thread loads.
DEVICE void sum(const Shared& shared, Inputs& inputs, const Outputs& outputs) {
  KeyRing ring = shared.ring();
  Turn turn;
  float o[128];
  UNROLL for (u32 i = 0; i < 128; i++) o[i] = 0.0f;
  if (FP8) widen_first(shared);
  for (u32 number = 0, item = 0;; ring.next()) {
    load_ahead(shared, ring, turn, inputs);
    __syncwarp();
    if (item != 0) barrier_wait(shared.weighed(turn), turn.parity);
    const Piece& piece = shared.loader().pieces[number % 2];
    if (item == 0) {
      ring.wait_full();
      if (piece.tiles == 0) break;
      if (FP8) widen_ahead(shared, ring, item, piece.tiles, number);
      release_to_sharers(ring.empty());
      item = 1;
    } else if (item <= piece.tiles) {
      ring.wait_full();
      if (item != 1) decay_sums(o, shared.factors(turn));
      turn.next();
      barrier_wait(shared.scored(turn), turn.parity);
      issue_values(o, shared.rotated(ring.place),
                   shared.tile(ring.place) + half_of_thread() * (SLABS / 2 * SLAB), item == 1);
      if (FP8) widen_ahead(shared, ring, item, piece.tiles, number);
      wgmma_wait<0>();
      keep(o);
      release_to_sharers(ring.empty());
      item++;
    } else {
      ring.wait_empty();
      store_rows(o, shared.factors(turn), shared.tile(ring.place), piece, outputs);
      release_to_sharers(ring.empty());
      if (FP8) widen_ahead(shared, ring, item, piece.tiles, number);
      turn.next();
      item = 0, number++;
    }
  }
}

// The grid: BLOCKS times the clusters by the groups of BLOCKS * ROWS rows. `share` is the least
// number of places that a cluster takes.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
    mla_attend(const __grid_constant__ TensorMap q_latent, const __grid_constant__ TensorMap q_rope,
               const __grid_constant__ TensorMap latent, const __grid_constant__ TensorMap rotated,
               const __grid_constant__ TensorMap out, const int* pages, i64 pages_sequence,
               const int* lengths, u16* sums, float* lse, float* scales, Cut* cuts,
               const float* kv_scale, float scale, int sequences, int rows, int kv_len, int start,
               int share, int cut_of_sequence) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared = {memory, shared_address(memory)};
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
  const u32 clusters = gridDim.x / BLOCKS;
  Inputs inputs = {q_latent, q_rope, latent, rotated, {pages, pages_sequence}};
  inputs.schedule = {lengths, (u32)sequences, (u32)kv_len, clusters, (u32)start, (u32)share};
  inputs.cuts = cuts, inputs.cut_of_sequence = cut_of_sequence;
  if (threadIdx.x == LOADING_THREAD) {
    shared.init();
    tma_prefetch_map(q_latent);
    tma_prefetch_map(q_rope);
    tma_prefetch_map(latent);
    tma_prefetch_map(rotated);
    tma_prefetch_map(out);
  }
  cluster_sync();
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  if (threadIdx.x / WARP == LOADING_THREAD / WARP) begin_loading(shared, inputs);
  const Outputs outputs = {out, {sums, lse, scales}, 2 * clusters, (u32)rows};
  if (warpgroup == 0) {
    raise_registers<184>();
    weigh(shared, scale, kv_scale, outputs);
  } else {
    drop_registers<160>();
    sum(shared, inputs, outputs);
  }
  __syncwarp();
  cluster_sync();  // no block may end while another still arrives at its barriers
}
