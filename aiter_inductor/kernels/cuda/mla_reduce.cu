// Adds what several clusters of mla.cu found of the same rows.
#include "barrier.h"
#include "mla_schedule.h"

constexpr u32 WARPS = 8, MOST = 160;  // of a block; clusters that may have parts of a sequence
constexpr u32 DEEP = 8;               // parts that a lane has under way at once
constexpr u32 COLUMNS = RANK / 2 / WARP, PIECES = 2;  // of a lane; of a row

DEVICE void add(float (&sum)[COLUMNS], float weight, const uint4& x) {
  const u32 pairs[] = {x.x, x.y, x.z, x.w};
  UNROLL for (u32 i = 0; i < COLUMNS; i++)
    sum[i] = fmaf(weight, from_fp16(pairs[i / 2] >> i % 2 * 16), sum[i]);
}

// The rows that are parts of one: that of the cluster which begins with the sequence, that of the
// next one, and so on.
struct Parts {
  u32 begins, next, apart;
  __device__ __forceinline__ u32 at(u32 part) const {
    return part == 0 ? begins : next + (part - 1) * apart;
  }
};

// By what each part of a row is multiplied, into `weights`.
DEVICE void weigh(float* weights, const float* lse, const float* scales, const Parts& parts,
                  u32 count, u32 half) {
  const u32 lane = threadIdx.x % WARP;
  float weight[MOST / WARP], scale[MOST / WARP], highest = minus_infinity(), total = 0.0f;
  UNROLL for (u32 i = 0; i < MOST / WARP; i++) {
    const u32 part = i * WARP + lane;
    const bool inside = part < count;
    weight[i] = inside ? lse[parts.at(part)] : minus_infinity();
    scale[i] = inside ? scales[parts.at(part) * PIECES + half] : 0.0f;
    highest = fmaxf(highest, weight[i]);
  }
  UNROLL for (u32 lanes = 16; lanes != 0; lanes /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, lanes));
  const float origin = highest == minus_infinity() ? 0.0f : highest;
  UNROLL for (u32 i = 0; i < MOST / WARP; i++)
    total += weight[i] = exp2_approximate(weight[i] - origin);
  UNROLL for (u32 lanes = 16; lanes != 0; lanes /= 2)
    total += __shfl_xor_sync(~0u, total, lanes);
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  UNROLL for (u32 i = 0; i < MOST / WARP; i++)
    weights[i * WARP + lane] = weight[i] * factor * scale[i];
  __syncwarp();
}

// Rows of cut sequences over their parts. A warp takes half a row; where many clusters may have
// parts of it (`spread`), a block takes it, and a warp every eighth of them.
// The grid: halves of rows of a sequence, for a warp or a block each, by entries of `cuts`, which
// is null where all sequences are as long.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    mla_reduce(const u16* sums, const float* lse, const float* scales, const Cut* cuts, u16* out,
               i64 out_sequence, i64 out_row, int rows, int group_rows, int slots, int spread,
               int sequences, int kv_len, int start, int share, int cut_of_sequence) {
  __shared__ float weights[WARPS][MOST];
  __shared__ float found[WARPS][RANK / 2];
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const u32 item = spread ? blockIdx.x : blockIdx.x * WARPS + warp;
  const u32 row = item / PIECES, half = item % PIECES, group = row / group_rows;
  const u32 first = spread ? warp : 0, step = spread ? WARPS : 1;
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  if (row >= rows) return;
  const u32 clusters = slots / 2;
  const Schedule all = {nullptr, (u32)sequences, (u32)kv_len, clusters, (u32)start, (u32)share};
  const Cut cut = cuts ? cuts[blockIdx.y] : all.cut(blockIdx.y, cut_of_sequence);
  if (cut.count <= 1) return;
  const u32 begins = group * slots + slot_of(cut.cluster, true);
  const u32 next = group * slots + slot_of(cut.cluster + 1, false);
  const u32 in_group = row % group_rows;
  const Parts parts = {begins * group_rows + in_group, next * group_rows + in_group,
                       2u * group_rows};

  const u32 in_slab = row % 64, chunk = (lane % 8) ^ (row % 8);  // as mla_rows.h leaves them
  const u16* columns = sums + half * (64 * RANK / 2) + lane / 8 * (64 * 64) + in_slab * 64 +
                       chunk * COLUMNS;
  uint4 x[DEEP];
  UNROLL for (u32 i = 0; i < DEEP; i++)
    if (first + i * step < cut.count)
      x[i] = *(const uint4*)(columns + (u64)(parts.at(first + i * step) - in_slab) * RANK);
  weigh(weights[warp], lse, scales, parts, cut.count, half);
  float sum[COLUMNS] = {};
  for (u32 part = first; part < cut.count; part += DEEP * step) {
    UNROLL for (u32 i = 0; i < DEEP; i++) {
      const u32 at = part + i * step;
      if (at >= cut.count) break;
      if (part != first) x[i] = *(const uint4*)(columns + (u64)(parts.at(at) - in_slab) * RANK);
      add(sum, weights[warp][at], x[i]);
    }
  }
  u16* to = out + cut.sequence * out_sequence + row * out_row + half * (RANK / 2);
  if (spread) {
    UNROLL for (u32 i = 0; i < COLUMNS; i++) found[warp][i * WARP + lane] = sum[i];
    __syncthreads();
    if (warp != 0) return;
    UNROLL for (u32 i = 0; i < COLUMNS; i++)
      UNROLL for (u32 j = 1; j < WARPS; j++) sum[i] += found[j][i * WARP + lane];
  }
  ((uint4*)to)[lane] = {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                        pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
}
