// Functions that the device libraries would supply; no ROCm header or library is required.
#pragma once

#include "numeric.h"

SIMT_DEVICE float sigmoid(float x) {
  return reciprocal(1.0f + power_of_two(x * -1.44269504f));
}

SIMT_DEVICE float hyperbolic_tangent(float x) {
  return 1.0f - 2.0f * reciprocal(1.0f + power_of_two(x * 2.88539008f));
}

template <int N> SIMT_DEVICE float polynomial(const float (&coefficients)[N], float x) {
  float sum = coefficients[N - 1];
  UNROLL for (int i = N - 2; i >= 0; i--) sum = multiply_add(sum, x, coefficients[i]);
  return sum;
}

// Within 1.3e-7 everywhere: Chebyshev fits of erf(x) / x in x * x below 1, and of log2(erfc(x))
// from 1 to 4, beyond which erf is 1 in fp32.
SIMT_DEVICE float error_function(float x) {
  const float near_zero[] = {1.12837911f,    -0.37612626f,   0.112835974f,   -0.0268543288f,
                             0.00518931216f, -0.0008018855f, 7.8824974e-05f};
  const float log2_of_rest[] = {0.0004374439f,  -1.63048589f,    -0.9116925f,
                                -0.158665076f,  0.0380362458f,   -0.00683869515f,
                                0.000855185674f, -6.57733690e-05f, 2.32859884e-06f};
  const float size = float_of(bits_of(x) & 0x7fffffff);
  const float small = x * polynomial(near_zero, x * x);
  const float large = 1.0f - power_of_two(polynomial(log2_of_rest, size < 4.0f ? size : 4.0f));
  return size > 1.0f ? float_of(bits_of(large) | (bits_of(x) & 0x80000000)) : small;
}
