// Adds the parts of rows that the clusters of mla_few.cu leave.
#include "mla_few.h"

constexpr u32 SHARERS = 2;  // warpgroups among which the parts are dealt out
constexpr u32 DEEP = 16;    // parts that a thread has under way at once

// Parts of a thread's two rows, over 2^`highest`.
struct Sum {
  float of[4], total[2], highest[2];

  // Makes room for a part of log2-sum-exp2 `most`.
  __device__ __forceinline__ void raise(u32 h, float most) {
    const float decay = exp2_approximate(highest[h] - most);
    highest[h] = most;
    total[h] *= decay, of[2 * h] *= decay, of[2 * h + 1] *= decay;
  }
};

// One quad of one piece over all clusters. The grid: QUADS, by the pieces of a cluster, by groups
// of rows and sequences.
extern "C" __global__ void __launch_bounds__(SHARERS* WARPGROUP)
    mla_few_reduce(const uint2* sums, const float2* scale, u16* out, i64 out_sequence, i64 out_row,
                   int rows, int groups, int clusters) {
  __shared__ Sum found[WARPGROUP];
  const Parts parts = {(uint2*)sums, (float2*)scale, (u32)groups, (u32)clusters};
  const u32 thread = threadIdx.x % WARPGROUP, sharer = threadIdx.x / WARPGROUP;
  const u32 rank = blockIdx.y / 2, half = blockIdx.y % 2;
  const u32 group = blockIdx.z % groups, sequence = blockIdx.z / groups;
  const u32 piece = parts.piece(sequence, group, 0, rank, half);
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const float2 none = {minus_infinity(), 0.0f};
  Sum sum = {{}, {}, {-1e30f, -1e30f}};
  for (u32 first = sharer; first < clusters; first += DEEP * SHARERS) {
    uint2 x[DEEP];
    float2 by[DEEP][2];
    UNROLL for (u32 i = 0; i < DEEP; i++) {
      const u32 part = first + i * SHARERS, at = piece + part * CLUSTER * 2;
      const bool inside = part < clusters;
      UNROLL for (u32 h = 0; h < 2; h++)
        by[i][h] = inside ? scale[at * 64 + row_of_thread() + h * 8] : none;
      x[i] = inside ? sums[(at * QUADS + blockIdx.x) * WARPGROUP + thread] : uint2{0, 0};
    }
    UNROLL for (u32 h = 0; h < 2; h++) {
      float most = sum.highest[h];
      UNROLL for (u32 i = 0; i < DEEP; i++) most = fmaxf(most, by[i][h].x);
      sum.raise(h, most);
      UNROLL for (u32 i = 0; i < DEEP; i++) {
        const float weight = exp2_approximate(by[i][h].x - most), scaled = weight * by[i][h].y;
        const u32 pair = h ? x[i].y : x[i].x;
        sum.total[h] += weight;
        sum.of[2 * h] = fmaf(scaled, from_fp16(pair), sum.of[2 * h]);
        sum.of[2 * h + 1] = fmaf(scaled, from_fp16(pair >> 16), sum.of[2 * h + 1]);
      }
    }
  }
  if (sharer != 0) found[thread] = sum;
  __syncthreads();
  if (sharer != 0) return;
  Sum other = found[thread];
  float x[4];
  UNROLL for (u32 h = 0; h < 2; h++) {
    const float most = fmaxf(sum.highest[h], other.highest[h]);
    sum.raise(h, most);
    other.raise(h, most);
    const float total = sum.total[h] + other.total[h], by = total == 0.0f ? 0.0f : 1.0f / total;
    UNROLL for (u32 i = 2 * h; i < 2 * h + 2; i++) x[i] = (sum.of[i] + other.of[i]) * by;
  }
  const Result result = {out, out_sequence, out_row, (u32)rows};
  result.store(sequence, group, rank, half, blockIdx.x, x);
}
