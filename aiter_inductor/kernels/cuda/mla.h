// What the kernels of latent attention and the reduction of their parts share.
#pragma once

#include "types.h"

constexpr u32 KEYS = 64, RANK = 512;  // keys of a tile, latent columns

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The first of the two rows of 64 that a thread of a warpgroup holds of sums; the other is 8
// further.
DEVICE u32 row_of_thread() {
  return threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
}

DEVICE float from_fp16(u32 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
  return y;
}

// Makes `factor` bring `highest`, the highest sum of a thread over `factor`, or of another of the
// four lanes that share a row, to 2^14 and more: fp16 then is as precise as if it had bf16's range.
// Returns by what the reduction has to multiply.
DEVICE float scale_to_fp16(float& factor, float highest) {
  highest *= factor;
  highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
  highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
  const u32 exponent = max(__float_as_uint(highest) >> 23, 27u);
  factor *= __uint_as_float((268 - exponent) << 23);
  return __uint_as_float((exponent - 14) << 23);
}
