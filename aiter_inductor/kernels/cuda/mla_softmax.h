// Scores to weights: online softmax of a warpgroup that holds 64 rows by 64 keys, as wgmma leaves
// them.
#pragma once

#include "mla_load.h"

constexpr float LOWEST = -1e30f;  // the origin before any score

DEVICE void hide_keys_from(float (&s)[32], u32 end) {
  const u32 lane = thread_in_block() % WARP;
  UNROLL for (u32 i = 0; i < 32; i++) {
    const u32 key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (key >= end) s[i] = minus_infinity();
  }
}

// Stores weights, in pairs as `Softmax::add` makes them, as wgmma's A.
DEVICE void store_weights(const u32 (&p)[16], u32 to) {
  const u32 lane = thread_in_block() % WARP, row = thread_in_block() / WARP * 16 + lane % 16;
  UNROLL for (u32 j = 0; j < 4; j++)
    stmatrix_x4(to + swizzle_128(row, j * 2 + lane / 16), p[4 * j], p[4 * j + 1], p[4 * j + 2],
                p[4 * j + 3]);
}

// Online softmax of a thread's two rows, in powers of 2; four lanes share a row. The origin of a
// row moves only when a score exceeds it by more than 8: weights stay below 2^8, and the sums
// rarely have to be rescaled.
struct Softmax {
  float origin[2], total[2], decay[2];

  // Turns scores into weights 2^(s scale - origin), in pairs; scale is positive.
  __device__ __forceinline__ void add(const float (&s)[32], const float (&scale)[2],
                                      u32 (&p)[16]) {
    float highest[2];
    UNROLL for (u32 h = 0; h < 2; h++) {
      float by_four[4];
      UNROLL for (u32 i = 0; i < 4; i++) by_four[i] = s[i / 2 * 4 + 2 * h + i % 2];
      UNROLL for (u32 i = 4; i < 16; i++)
        by_four[i % 4] = fmaxf(by_four[i % 4], s[i / 2 * 4 + 2 * h + i % 2]);
      highest[h] = fmaxf(fmaxf(by_four[0], by_four[1]), fmaxf(by_four[2], by_four[3]));
      highest[h] *= scale[h];
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
        const float a = exp2_approximate(fmaf(s[4 * j + 2 * h], scale[h], -origin[h]));
        const float b = exp2_approximate(fmaf(s[4 * j + 2 * h + 1], scale[h], -origin[h]));
        sums[0] += a, sums[1] += b;
        p[2 * j + h] = FP8 ? pack_fp16(a, b) : pack_bf16(a, b);
      }
      total[h] = sums[0] + sums[1];
    }
  }
};
