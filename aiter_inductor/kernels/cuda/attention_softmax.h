// Masks, caps and the online softmax over tiles of scores, which lie as attention_rows.h says.
#pragma once

#include "attention_items.h"
#include "attention_rows.h"

// Hides what row `row` (and the one 8 below) of the queries must not see of tile `tile`.
// `first_row`: of the warpgroup, by which all its threads agree whether there is anything to hide.
DEVICE void hide(float (&s)[BLOCK_N / 2], const Problem& problem, const Item& item,
                 const FirstKeys& first_keys, int first_row, int row, int tile) {
  const int shift = problem.shift_of(item), first = first_row + shift, key = tile * BLOCK_N;
  bool hides = key + BLOCK_N > item.num_keys;
  if (CAUSAL) hides |= key + BLOCK_N - 1 > first;
  if (WINDOW) hides |= key <= first + 63 - problem.window;
  if (FIRST_KEYS) hides |= key < first_keys.last;
  if (!hides) return;
  const int origin = key + 2 * (threadIdx.x % 4), own = row + shift;
  int last[2], before[2];
  UNROLL for (int h = 0; h < 2; h++) {
    last[h] = item.num_keys - 1;
    if (CAUSAL) last[h] = min(last[h], own + 8 * h);
    last[h] -= origin;
    before[h] = WINDOW ? own + 8 * h - problem.window - origin : -1;
    if (FIRST_KEYS) before[h] = max(before[h], first_keys.own[h] - 1 - origin);
  }
  UNROLL for (int i = 0; i < BLOCK_N / 2; i++) {
    const int column = 8 * (i / 4) + i % 2, h = i % 4 / 2;
    if (column > last[h] || ((WINDOW || FIRST_KEYS) && column <= before[h])) s[i] = -INF;
  }
}

// tanh of the scores times `scale` / 2 log2(e).
DEVICE void cap(float (&s)[BLOCK_N / 2], float scale) {
  UNROLL for (int i = 0; i < BLOCK_N / 2; i++) s[i] = tanh_approx(s[i] * scale);
}

// Two rows' running maxima of raw scores, and sums of this thread's exponentials.
struct Softmax {
  float max[2], sum[2], factor[2];
  bool rescale;  // whether this warp's output so far is to be multiplied by `factor`

  // Takes in the maxima of a tile of scores; `scale` is log2(e) times the factor on them.
  template <bool FIRST> __device__ void see(const float (&s)[BLOCK_N / 2], float scale) {
    float tops[4], top[2];
    UNROLL for (int i = 0; i < 4; i++) tops[i] = s[i];
    UNROLL for (int i = 4; i < BLOCK_N / 2; i++) tops[i % 4] = fmaxf(tops[i % 4], s[i]);
    UNROLL for (int h = 0; h < 2; h++) top[h] = row_max(fmaxf(tops[2 * h], tops[2 * h + 1]));
    rescale = false;
    if (FIRST) {
      UNROLL for (int h = 0; h < 2; h++) max[h] = top[h], sum[h] = 0.f;
      return;
    }
    // Many tiles raise no row's maximum: then nothing is rescaled.
    rescale = __any_sync(~0u, top[0] > max[0] || top[1] > max[1]);
    if (!rescale) return;
    UNROLL for (int h = 0; h < 2; h++) {
      const float before = max[h];
      max[h] = fmaxf(before, top[h]);
      factor[h] = exp2_approx((before - base(h)) * scale);
      sum[h] *= factor[h];
    }
  }
  // Turns the scores into exponentials, the largest of a row 1.
  __device__ void exponentiate(float (&s)[BLOCK_N / 2], float scale) {
    const float least[2] = {base(0) * scale, base(1) * scale};
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++)
      s[i] = exp2_approx(fmaf(s[i], scale, -least[i % 4 / 2]));
    float sums[4] = {};
    UNROLL for (int i = 0; i < BLOCK_N / 2; i++) sums[i % 4] += s[i];
    UNROLL for (int h = 0; h < 2; h++) sum[h] += sums[2 * h] + sums[2 * h + 1];
  }

  // The maximum, or 0 where no key was seen.
  __device__ float base(int h) const { return max[h] == -INF ? 0.f : max[h]; }
};
