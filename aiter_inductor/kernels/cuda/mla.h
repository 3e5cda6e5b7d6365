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
