// Flash attention forward for sm_90: softmax(q k^T * scale) v, heads in groups sharing k and v.
//
// One warp copies queries, keys and values by TMA. WARPGROUPS warpgroups each hold 64 queries: the
// scores of a tile of keys are in flight with the tile before, weighed against its values, and
// while one warpgroup computes exponentials another has the tensor cores. Blocks are persistent,
// and the first tile of the next queries is in flight while a result is written.
// The ideas are those of FlashAttention-3 (Shah et al., 2024); layouts are in attention_work.h.

#include "attention_work.h"
#include "attention_products.h"
#include "attention_softmax.h"

// ---- the warp that copies

struct Copier {
  Shared shared;
  const TensorMap &q_map, &k_map, &v_map, &q_rest_map, &k_rest_map;
  KvRing k_ring, v_ring;

  template <int COLUMNS, u32 COLUMN_BYTES>
  __device__ void columns(u32 to, const TensorMap& map, u32 full, int row, int head, int batch) {
    UNROLL for (int column = 0; column < COLUMNS; column++)
      tma_load_4d(to + column * COLUMN_BYTES, map, full, 64 * column, row, head, batch);
  }
  __device__ void keys(int row, int head, int batch) {
    const u32 to = shared.k(k_ring.place), full = k_ring.full();
    k_ring.wait_empty();
    barrier_expect(full, K_BYTES);
    columns<OWN_COLUMNS, KV_COLUMN_BYTES>(to, k_map, full, row, head, batch);
    columns<SHARED_COLUMNS, KV_COLUMN_BYTES>(to + OWN_COLUMNS * KV_COLUMN_BYTES, k_rest_map, full,
                                             row, 0, batch);
    k_ring.next();
  }
  __device__ void values(int row, int head, int batch) {
    const u32 to = shared.v(v_ring.place), full = v_ring.full();
    v_ring.wait_empty();
    barrier_expect(full, V_BYTES);
    columns<V_COLUMNS, KV_COLUMN_BYTES>(to, v_map, full, row, head, batch);
    v_ring.next();
  }
  __device__ void queries(QRing ring, u32 to, int row, int head, int batch) {
    ring.wait_empty();
    barrier_expect(ring.full(), Q_BYTES);
    columns<OWN_COLUMNS, Q_COLUMN_BYTES>(to, q_map, ring.full(), row, head, batch);
    columns<SHARED_COLUMNS, Q_COLUMN_BYTES>(to + OWN_COLUMNS * Q_COLUMN_BYTES, q_rest_map,
                                            ring.full(), row, head, batch);
  }

  // In the order in which they are used: the keys of a tile, then the values of the one after it.
  __device__ void run(const Problem& problem, int* counter) {
    ItemRing items = shared.item_ring();
    int index = blockIdx.x;
    u32 parity = 0;
    while (true) {
      const int next = counter ? gridDim.x + atomicAdd(counter, 1) : index + gridDim.x;
      const Item item = item_at(problem, index);
      index = next;
      if (PACKED && item.head >= 0 && item.rows >= item.num_queries) continue;
      items.wait_empty();
      write_item(shared.item(items.place), item);
      barrier_arrive(items.full());
      items.next();
      if (item.head < 0) return;
      const int batch = item.head / problem.num_heads, head = item.head % problem.num_heads;
      const int kv_head = head / problem.heads_per_kv;
      for (int w = 0; w < WARPGROUPS; w++) {
        QRing ring = shared.q_ring(w);
        ring.parity = parity;
        queries(ring, shared.q(w), item.first_query + item.rows + 64 * w, head, batch);
      }
      parity ^= 1;
      int row = item.first_key + (item.end - 1) * BLOCK_N;
      keys(row, kv_head, batch);
#pragma unroll 1
      for (int number = item.end - 2; number >= item.begin; number--) {
        keys(row - BLOCK_N, kv_head, batch);
        values(row, kv_head, batch);
        row -= BLOCK_N;
      }
      values(row, kv_head, batch);
    }
  }
};

// ---- the warpgroups that multiply

// Where results go: strides in elements; `lse` [all_heads, num_queries] and `sinks` may be null.
// `scale` is the factor by which the softmax takes the scores, or tanh of them where they are
// capped.
struct Results {
  u16* out;
  float* lse;
  const float* sinks;
  i64 batch_stride, head_stride, row_stride;
  int v_dim;
  float scale;
};

struct Multiplier {
  Shared shared;
  int warpgroup;
  float scale;      // that of Results, times log2(e)
  float cap_scale;  // of `cap`
  QRing q_ring;
  KvRing k_ring, v_ring;
  ItemRing items;
  Softmax softmax;
  FirstKeys first_keys;
  float s[BLOCK_N / 2];  // scores, then exponentials
  u32 p[BLOCK_N / 4];    // exponentials in 16 bits
  float o[V_DIM / 2];

  __device__ Multiplier(Shared shared, int warpgroup, float scale, float cap_scale)
      : shared(shared), warpgroup(warpgroup), scale(scale), cap_scale(cap_scale),
        q_ring(shared.q_ring(warpgroup)), k_ring(shared.k_ring()), v_ring(shared.v_ring()),
        items(shared.item_ring()) {}

  __device__ Item next_item(const Problem& problem) {
    items.wait_full();
    const Item item = read_item(shared.item(items.place), problem);
    release(items.empty());
    items.next();
    return item;
  }

  __device__ void start_scores() {
    const u64 q = k_major_descriptor(shared.q(warpgroup));
    const u64 k = k_major_descriptor(shared.k(k_ring.place));
    keep(s);
    wgmma_fence();
    UNROLL for (int step = 0; step < QK_DIM / 16; step++) {
      const u64 q_at = q + (step / 4 * Q_COLUMN_BYTES + step % 4 * 32) / 16;
      const u64 k_at = k + (step / 4 * KV_COLUMN_BYTES + step % 4 * 32) / 16;
      multiply<BLOCK_N, false, false>(s, q_at, k_at, step > 0);
    }
    wgmma_commit();
  }
  __device__ void start_output(bool accumulate) {
    const u64 v = mn_major_descriptor(shared.v(v_ring.place), KV_COLUMN_BYTES);
    keep(o);
    wgmma_fence();
    UNROLL for (int step = 0; step < BLOCK_N / 16; step++) {
      const u32 a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      multiply<V_DIM, true>(o, a, v + step * 2048 / 16, accumulate || step > 0);
    }
    wgmma_commit();
  }
  __device__ void finish_output() {
    wgmma_wait<0>();
    keep(o);
    release(v_ring.empty());
    v_ring.next();
  }
  // Waits for the values of a tile; PACKED, those of the next sequence become zeros, since a weight
  // of 0 times NaN would be seen. Each warpgroup writes them for itself.
  __device__ void wait_values(const Item& item, int tile) {
    v_ring.wait_full();
    const int kept = item.num_keys - tile * BLOCK_N;
    if (PACKED && kept < BLOCK_N) {
      clear_rows<BLOCK_N, V_COLUMNS>(shared.v(v_ring.place), kept, BLOCK_N);
      fence_shared();
      named_sync(1 + warpgroup, WARPGROUP);
    }
  }
  __device__ void rescale_output() {
    if (!softmax.rescale) return;
    UNROLL for (int i = 0; i < V_DIM / 2; i++) o[i] *= softmax.factor[i % 4 / 2];
  }
  // Scores to exponentials in 16 bits; the values that `p` was weighed against have been used.
  __device__ void exponentiate() {
    softmax.exponentiate(s, scale);
    UNROLL for (int i = 0; i < BLOCK_N / 4; i++) p[i] = pack_16(s[2 * i], s[2 * i + 1]);
  }
  // After the scores of tile `number` have arrived.
  template <bool FIRST> __device__ void see(const Problem& problem, const Item& item, int number) {
    keep(s);
    release(k_ring.empty());
    k_ring.next();
    if (number == item.begin) {
      release(q_ring.empty());
      q_ring.next();
    }
    const int first_row = item.rows + 64 * warpgroup;
    const int row = first_row + threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
    if (SOFTCAP) cap(s, cap_scale);
    if (FIRST) first_keys.read(problem, item, first_row, row);
    hide(s, problem, item, first_keys, first_row, row, number);
    softmax.template see<FIRST>(s, scale);
  }

  __device__ void run(const Problem& problem, const Results& results);
  __device__ void write(const Problem& problem, const Results& results, const Item& item);
};

__device__ __forceinline__ void Multiplier::run(const Problem& problem, const Results& results) {
  Item item = next_item(problem);
  if (item.head < 0) return;
  q_ring.wait_full();
  k_ring.wait_full();
  start_scores();
  while (true) {
    wgmma_wait<0>();
    see<true>(problem, item, item.end - 1);
    exponentiate();
    bool accumulate = false;
#pragma unroll 1
    for (int number = item.end - 2; number >= item.begin; number--) {
      k_ring.wait_full();
      start_scores();
      rescale_output();
      wait_values(item, number + 1);
      start_output(accumulate);
      wgmma_wait<1>();
      see<false>(problem, item, number);
      // To wait before the exponentials, while another warpgroup has the tensor cores, is faster
      // than after them: 471 us against 494 for 2x4096 tokens of 32 and 8 heads on an H100.
      finish_output();
      exponentiate();
      accumulate = true;
    }
    const Item next = next_item(problem);
    rescale_output();
    wait_values(item, item.begin);
    start_output(accumulate);
    finish_output();
    if (next.head < 0) break;
    q_ring.wait_full();
    k_ring.wait_full();
    start_scores();
    write(problem, results, item);
    item = next;
  }
  write(problem, results, item);
}

__device__ __forceinline__ void Multiplier::write(const Problem& problem, const Results& results,
                                                  const Item& item) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
  const int batch = item.head / problem.num_heads, head = item.head % problem.num_heads;
  const int row = item.rows + 64 * warpgroup + 16 * warp + lane / 4;
  const int left = item.num_queries - row;
  const i64 in_batch = item.first_query + row;
  float inverse[2];
  UNROLL for (int h = 0; h < 2; h++) {
    float sum = row_sum(softmax.sum[h]);
    if (results.sinks)
      sum += exp2_approx(results.sinks[head] * LOG2_E - softmax.base(h) * scale);
    inverse[h] = sum == 0.f ? 0.f : 1.f / sum;
    if (results.lse && lane % 4 == 0 && 8 * h < left)
      results.lse[(i64)item.head * problem.num_queries + in_batch + 8 * h] =
          softmax.base(h) * results.scale + __logf(sum);
  }
  u16* to = results.out + batch * results.batch_stride + head * results.head_stride +
            in_batch * results.row_stride;
  write_rows(o, inverse, to, results.row_stride, left, results.v_dim);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(const __grid_constant__ TensorMap q_map,
                     const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map,
                     const __grid_constant__ TensorMap q_rest_map,
                     const __grid_constant__ TensorMap k_rest_map, u16* out, float* lse,
                     const float* sinks, int* counter, const int* q_starts, const int* k_starts,
                     const int* first_keys, int num_heads, int heads_per_kv, int all_heads,
                     int num_queries, int num_keys, int shift, int window, int row_blocks,
                     int heads_together, int num_sequences,
                     int from_end, int v_dim, float scale, float scale_log2, float cap_scale,
                     i64 batch_stride, i64 head_stride, i64 row_stride) {
  extern __shared__ u8 storage[];
  const Shared shared{(shared_address(storage) + 1023) & ~1023u};
  const Problem problem{num_heads,  heads_per_kv,   all_heads, num_queries, num_keys,
                        shift,      window,         row_blocks, heads_together, q_starts,
                        k_starts,   num_sequences,  from_end,  first_keys};
  if (threadIdx.x == 0) {
    for (int w = 0; w < WARPGROUPS; w++) shared.q_ring(w).init();
    shared.k_ring().init();
    shared.v_ring().init();
    shared.item_ring().init();
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    drop_registers<WARPGROUPS == 2 ? 40 : 32>();
    if (threadIdx.x == 0) {
      Copier copier{shared,     q_map,      k_map,           v_map,
                    q_rest_map, k_rest_map, shared.k_ring(), shared.v_ring()};
      copier.run(problem, counter);
    }
  } else {
    raise_registers<WARPGROUPS == 2 ? 232 : 160>();
    // The same in all lanes, and known to be to the compiler.
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / (int)WARPGROUP - 1, 0);
    Multiplier multiplier(shared, warpgroup, scale_log2, cap_scale);
    multiplier.run(problem,
                   {out, lse, sinks, batch_stride, head_stride, row_stride, v_dim, scale});
  }
}
