// Adds what several blocks of mla.cu, or clusters of mla_clusters.cu, found of the same rows.
#include "barrier.h"
#include "mla.h"

// One row over the parts of its sequence, each of `chunk` keys, where there are several:
// [splits, num_rows, 512] with their log2-sum-exp2; zeros if none saw a key.
// Four groups of threads take every fourth part; at most 64 parts.
extern "C" __global__ void __launch_bounds__(RANK)
    mla_reduce(const float* partial, const float* lse, const int* lengths, u16* out,
               i64 out_sequence, i64 out_row, int num_rows, int rows, int kv_len, int chunk) {
  __shared__ float4 sums[4][RANK / 4];
  __shared__ float weights[64];
  const u32 group = threadIdx.x / (RANK / 4), column = threadIdx.x % (RANK / 4);
  const u64 row = blockIdx.x;
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  if (lengths) kv_len = lengths[row / rows];
  const u32 splits = ceil_div((u32)kv_len, (u32)chunk);
  if (splits <= 1) return;
  if (threadIdx.x < WARP) {
    float known[2], highest = minus_infinity(), total = 0.0f;
    UNROLL for (u32 i = 0; i < 2; i++) {
      const u32 part = i * WARP + threadIdx.x;
      known[i] = part < splits ? lse[(u64)part * num_rows + row] : minus_infinity();
      highest = fmaxf(highest, known[i]);
    }
    UNROLL for (u32 lanes = 16; lanes != 0; lanes /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, lanes));
    const float origin = highest == minus_infinity() ? 0.0f : highest;
    UNROLL for (u32 i = 0; i < 2; i++) total += known[i] = exp2_approximate(known[i] - origin);
    UNROLL for (u32 lanes = 16; lanes != 0; lanes /= 2)
      total += __shfl_xor_sync(~0u, total, lanes);
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    UNROLL for (u32 i = 0; i < 2; i++) weights[i * WARP + threadIdx.x] = known[i] * factor;
  }
  const float4* parts = (const float4*)partial + row * (RANK / 4) + column;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  float4 read[4];
  UNROLL for (u32 j = 0; j < 4; j++)
    if (group + 4 * j < splits) read[j] = parts[(u64)(group + 4 * j) * num_rows * (RANK / 4)];
  __syncthreads();
  for (u32 i = group; i < splits; i += 16) {
    UNROLL for (u32 j = 0; j < 4; j++) {
      if (i + 4 * j >= splits) continue;
      const float weight = weights[i + 4 * j];
      const float4 x = i == group ? read[j] : parts[(u64)(i + 4 * j) * num_rows * (RANK / 4)];
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
  }
  sums[group][column] = sum;
  __syncthreads();
  if (group != 0) return;
  UNROLL for (u32 g = 1; g < 4; g++) {
    const float4 x = sums[g][column];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  u16* to = out + row / rows * out_sequence + row % rows * out_row;
  ((uint2*)to)[column] = {pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w)};
}
