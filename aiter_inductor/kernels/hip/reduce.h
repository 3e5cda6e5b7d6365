// Reductions over the lanes that share a row: within a wave, or over a whole block through LDS.
#pragma once

#include "simt.h"

struct Sum {
  static constexpr Reduction KIND = Reduction::other;
  SIMT_DEVICE u32 of(u32 a, u32 b) { return bits_of(float_of(a) + float_of(b)); }
};

// Of magnitudes, compared as integers: the order is the same, and NaN, the largest, is kept.
struct Largest {
  static constexpr Reduction KIND = Reduction::largest;
  SIMT_DEVICE u32 of(u32 a, u32 b) { return a > b ? a : b; }
};

struct Lowest {
  static constexpr Reduction KIND = Reduction::lowest;
  SIMT_DEVICE u32 of(u32 a, u32 b) { return a < b ? a : b; }
};

SIMT_DEVICE u32 magnitude(float x) { return bits_of(x) & 0x7fffffff; }

// Over the WIDTH threads that a row has in each of COUNT blocks; `slots` holds a word for each wave
// of all of them that no other reduction of the kernel uses, which saves the barrier before the next
// one.
template <int WIDTH, int BLOCK, class Op, int COUNT = 1>
SIMT_DEVICE u32 row_reduce(u32 x, u32* slots, int rank = 0) {
  if constexpr (WIDTH <= WAVE && COUNT == 1) return wave_reduce<WIDTH, Op>(x);
  constexpr bool WHOLE = WIDTH == BLOCK && BLOCK % WAVE == 0;
  static_assert((WIDTH <= WAVE && COUNT == 1) || WHOLE, "whole waves");
  if constexpr (WHOLE && (WIDTH > WAVE || COUNT > 1)) {
    constexpr int PARTS = BLOCK / WAVE;
    x = wave_reduce<WAVE, Op>(x);
    share<COUNT>(slots + rank * PARTS + thread_index() / WAVE, x);
    barrier_of_row<COUNT>();
    x = slots[0];
    UNROLL for (int i = 1; i < COUNT * PARTS; i++) x = Op::of(x, slots[i]);
  }
  return x;
}

template <int WIDTH, int BLOCK> SIMT_DEVICE float row_sum(float x, u32* slots) {
  return float_of(row_reduce<WIDTH, BLOCK, Sum>(bits_of(x), slots));
}
