// Masks and the online softmax over tiles of scores, as wgmma leaves them in registers: of row h
// (0, or 1 for the row 8 below) a thread has s[4 j + 2 h + i], column 8 j + 2 (lane % 4) + i.
#pragma once

#include "attention_work.h"

constexpr float INF = __builtin_huge_valf();

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE u32 pack_16(float low, float high) {
  return FP16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

// The four lanes that share a row.
DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Hides what row `row` (and the one 8 below) of the queries must not see of tile `tile`.
// `first_row`: of the warpgroup, by which all its threads agree whether there is anything to hide.
DEVICE void hide(float (&s)[BLOCK_N / 2], const Problem& problem, int first_row, int row, int tile) {
  const int first = first_row + problem.shift, key = tile * BLOCK_N;
  bool hides = key + BLOCK_N > problem.num_keys;
  if (CAUSAL) hides |= key + BLOCK_N - 1 > first;
  if (WINDOW) hides |= key <= first + 63 - problem.window;
  if (!hides) return;
  const int origin = key + 2 * (threadIdx.x % 4), own = row + problem.shift;
  int last[2], before[2];
  UNROLL for (int h = 0; h < 2; h++) {
    last[h] = problem.num_keys - 1;
    if (CAUSAL) last[h] = min(last[h], own + 8 * h);
    last[h] -= origin;
    before[h] = own + 8 * h - problem.window - origin;
  }
  UNROLL for (int i = 0; i < BLOCK_N / 2; i++) {
    const int column = 8 * (i / 4) + i % 2, h = i % 4 / 2;
    if (column > last[h] || (WINDOW && column <= before[h])) s[i] = -INF;
  }
}

// Two rows' running maxima of raw scores, and sums of this thread's exponentials.
struct Softmax {
  float max[2], sum[2], factor[2];
  bool rescale;  // whether this warp's output so far is to be multiplied by `factor`

  // Turns scores into exponentials of them, `scale` being log2(e) times the factor on the scores.
  template <bool FIRST> __device__ void step(float (&s)[BLOCK_N / 2], float scale) {
    float tile_max[4];
    UNROLL for (int i = 0; i < 4; i++) tile_max[i] = s[i];
    UNROLL for (int i = 4; i < BLOCK_N / 2; i++) tile_max[i % 4] = fmaxf(tile_max[i % 4], s[i]);
    float top[2];
    UNROLL for (int h = 0; h < 2; h++) top[h] = row_max(fmaxf(tile_max[2 * h], tile_max[2 * h + 1]));
    raise<FIRST>(top, scale);
    UNROLL for (int h = 0; h < 2; h++) top[h] = base(h) * scale;
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++)
      s[i] = exp2_approx(fmaf(s[i], scale, -top[i % 4 / 2]));
    float sums[4] = {};
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++) sums[i % 4] += s[i];
    UNROLL for (int h = 0; h < 2; h++) sum[h] += sums[2 * h] + sums[2 * h + 1];
  }

  // The maximum, or 0 where no key was seen.
  __device__ float base(int h) const { return max[h] == -INF ? 0.f : max[h]; }

 private:
  // Most tiles raise no row's maximum: then nothing is rescaled.
  template <bool FIRST> __device__ void raise(float (&top)[2], float scale) {
    rescale = false;
    if (FIRST) {
      UNROLL for (int h = 0; h < 2; h++) max[h] = top[h], sum[h] = 0.f;
      return;
    }
    rescale = __any_sync(~0u, top[0] > max[0] || top[1] > max[1]);
    if (!rescale) return;
    UNROLL for (int h = 0; h < 2; h++) {
      const float before = max[h];
      max[h] = fmaxf(before, top[h]);
      factor[h] = exp2_approx((before - base(h)) * scale);
      sum[h] *= factor[h];
    }
  }
};
