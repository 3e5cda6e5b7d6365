// Rows of scores and results as wgmma leaves them in registers: of row h (0, or 1 for the row 8
// below) a thread has d[4 j + 2 h + i], column 8 j + 2 (lane % 4) + i. The build defines FP16.
#pragma once

#include "types.h"

constexpr float INF = __builtin_huge_valf();
constexpr float LOG2_E = 1.44269504f;

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh of x / 2 log2(e): by two approximations that are right to 1e-7, since tanh.approx is to 5e-4,
// which a cap of 50 would make an error of 0.02 in a logit.
DEVICE float tanh_approx(float x) {
  float share;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.f + exp2_approx(x)));
  return fmaf(-2.f, share, 1.f);
}

DEVICE u32 pack_16(float low, float high) {
  return FP16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

DEVICE float2 unpack_fp16(u32 pair) {
  float2 x;
  asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
}

DEVICE float2 unpack_16(u32 pair) {
  if (FP16) return unpack_fp16(pair);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
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

DEVICE void swap_with(u32& kept, u32& sent, bool upper, int lanes) {
  const u32 got = __shfl_xor_sync(~0u, upper ? kept : sent, lanes);
  (upper ? kept : sent) = got;
}

// Writes two rows times `factor`, 16 bits an element: four lanes exchange what they hold of a row,
// so that each writes 16 bytes of it. `rows`: how many of them, starting at `to`, there are.
template <u32 COUNT>
DEVICE void write_rows(const float (&d)[COUNT], const float (&factor)[2], u16* to, i64 stride,
                       int rows, int width) {
  const int quarter = threadIdx.x % 4;
  UNROLL for (int j = 0; j < COUNT / 4; j += 4) {
    UNROLL for (int h = 0; h < 2; h++) {
      u32 x[4];
      UNROLL for (int i = 0; i < 4; i++) {
        const float* pair = &d[4 * (j + i) + 2 * h];
        x[i] = pack_16(pair[0] * factor[h], pair[1] * factor[h]);
      }
      swap_with(x[0], x[1], quarter & 1, 1);
      swap_with(x[2], x[3], quarter & 1, 1);
      swap_with(x[0], x[2], quarter & 2, 2);
      swap_with(x[1], x[3], quarter & 2, 2);
      const int column = 8 * (j + quarter);
      if (8 * h < rows && column < width)
        *(uint4*)(to + 8 * h * stride + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}
