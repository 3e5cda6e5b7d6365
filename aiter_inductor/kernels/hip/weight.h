// The weight of an RMSNorm, applied with the roundings of eager code.
#pragma once

#include "numeric.h"

// x becomes x * (weight + offset), to be rounded to Next. ROUND_FIRST (Llama) rounds x, the shifted
// weight and their product to their types, as separate operations do; else, and where Next is the
// product's type, nothing more is rounded here. See rms_norm in lowerings/norm.py.
template <class Value, class Weight, class Product, class Next, bool ROUND_FIRST, bool OFFSET, int N>
SIMT_DEVICE void multiply_by_weight(const float (&weight)[N], float offset, float (&x)[N]) {
  float w[N];
  UNROLL for (int i = 0; i < N; i++) w[i] = OFFSET ? weight[i] + offset : weight[i];
  if constexpr (ROUND_FIRST && OFFSET) round_all<Weight>(w);
  if constexpr (ROUND_FIRST) round_all<Value>(x);
  UNROLL for (int i = 0; i < N; i++) x[i] *= w[i];
  if constexpr (ROUND_FIRST && !same<Product, Next>) round_all<Product>(x);
}
