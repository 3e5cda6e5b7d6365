// q = cast(clamp(x / scale, -QMAX, QMAX)) with scale = max(amax, amax_min) / QMAX.
#pragma once

#include "numeric.h"

template <class Q> constexpr float QMAX = 127.0f;
template <> constexpr float QMAX<fp8_e4m3fn> = 448.0f;
template <> constexpr float QMAX<fp8_e4m3fnuz> = 240.0f;

constexpr u32 INFINITY_BITS = 0x7f800000;
constexpr float LARGEST = 3.40282347e38f;

SIMT_DEVICE bool is_finite(float x) { return (bits_of(x) & INFINITY_BITS) != INFINITY_BITS; }

// Round to nearest even in integers, for a flavour that the chip does not convert to. Numbers below
// the smallest normal are rounded by an addition that leaves the result in the lowest bits.
template <Fp8 F> SIMT_DEVICE u32 fp8_bits(float x) {
  constexpr int BIAS = F == Fp8::e4m3fn ? 7 : 8;
  constexpr u32 NEGATIVE_ZERO = F == Fp8::e4m3fn ? 0x80 : 0;  // e4m3fnuz has none: 0x80 is its NaN
  const u32 sign = bits_of(x) >> 24 & 0x80, size = bits_of(x) & 0x7fffffff;
  if (x != x) return F == Fp8::e4m3fn ? sign | 0x7f : 0x80;
  u32 bits;
  if (size < (u32)(128 - BIAS) << 23) {
    const u32 denormal = (u32)(127 - BIAS + 23 - 2) << 23;
    bits = bits_of(float_of(size) + float_of(denormal)) - denormal;
  } else {
    bits = (size - ((u32)(127 - BIAS) << 23) + 0x7ffff + (size >> 20 & 1)) >> 20;
  }
  return bits ? sign | bits : sign & NEGATIVE_ZERO;
}

template <Fp8 F> SIMT_DEVICE u32 fp8x4(float a, float b, float c, float d) {
  if constexpr (HAS_NATIVE_FP8<F>)
    return native_fp8x4<F>(a, b, c, d);
  else
    return fp8_bits<F>(a) | fp8_bits<F>(b) << 8 | fp8_bits<F>(c) << 16 | fp8_bits<F>(d) << 24;
}

// |x| <= 127. Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
SIMT_DEVICE u32 int8_bits(float x) { return bits_of(x + 12582912.0f) & 0xff; }

template <class Q> SIMT_DEVICE u32 encode4(float a, float b, float c, float d) {
  if constexpr (same<Q, fp8_e4m3fn>) return fp8x4<Fp8::e4m3fn>(a, b, c, d);
  if constexpr (same<Q, fp8_e4m3fnuz>) return fp8x4<Fp8::e4m3fnuz>(a, b, c, d);
  if constexpr (same<Q, int8>)
    return int8_bits(a) | int8_bits(b) << 8 | int8_bits(c) << 16 | int8_bits(d) << 24;
}

// Division by one scale. A product with its reciprocal, corrected by the remainder, is the quotient
// as correctly rounded as a division, at a third of the instructions; it needs scale and reciprocal
// to be finite, so that rows of zeros, infinities or NaN are divided as written.
struct Divisor {
  float scale, inverse;
  bool ordinary;

  SIMT_DEVICE Divisor by(float scale) {
    float inverse = 1.0f / scale;
    if constexpr (BY_RECIPROCAL) inverse = scale > 0.0f && inverse > LARGEST ? LARGEST : inverse;
    return {scale, inverse, is_finite(scale) && is_finite(inverse)};
  }
  SIMT_DEVICE float quotient(const Divisor& d, float x) {
    const float close = x * d.inverse;
    return multiply_add(multiply_add(-close, d.scale, x), d.inverse, close);
  }
};

// Keeps NaN, as torch.clamp does.
template <class Q> SIMT_DEVICE float clamped(float x) {
  return x > QMAX<Q> ? QMAX<Q> : x < -QMAX<Q> ? -QMAX<Q> : x;
}

// What the conversion to Q does not clamp by itself.
template <class Q> SIMT_DEVICE float saturated(float x) {
  if constexpr (same<Q, fp8_e4m3fn>)
    return HAS_NATIVE_FP8<Fp8::e4m3fn> ? x : clamped<Q>(x);
  else
    return clamped<Q>(x);
}

// FINITE promises that x is finite wherever the scale is ordinary, as it is when the scale is x's
// own; a static scale may meet any x.
template <class Q, bool FINITE, int N>
SIMT_DEVICE void quantize(const Divisor& divisor, const float (&x)[N], float (&q)[N]) {
  if constexpr (BY_RECIPROCAL) {
    UNROLL for (int i = 0; i < N; i++) q[i] = saturated<Q>(x[i] * divisor.inverse);
  } else if (divisor.ordinary) {
    UNROLL for (int i = 0; i < N; i++) {
      const float quotient = Divisor::quotient(divisor, x[i]);
      if constexpr (FINITE)
        q[i] = median(quotient, -QMAX<Q>, QMAX<Q>);
      else
        q[i] = clamped<Q>(is_finite(quotient) ? quotient : x[i] * divisor.inverse);
    }
  } else {
    UNROLL for (int i = 0; i < N; i++) q[i] = clamped<Q>(x[i] / divisor.scale);
  }
}

template <class Q, int N> SIMT_DEVICE void store_quantized(Q* to, const float (&q)[N]) {
  if constexpr (N >= 4) {
    Chunk<N> chunk;
    UNROLL for (int i = 0; i < N; i += 4)
      chunk.words[i / 4] = encode4<Q>(q[i], q[i + 1], q[i + 2], q[i + 3]);
    *(Chunk<N>*)to = chunk;
  } else if constexpr (N == 2) {
    ((Chunk<2>*)to)->half = (u16)encode4<Q>(q[0], q[1], 0.0f, 0.0f);
  } else {
    to->bits = (u8)encode4<Q>(q[0], 0.0f, 0.0f, 0.0f);
  }
}

// The scale of a row or group whose largest magnitude has these bits.
template <class Q> SIMT_DEVICE float scale_of(u32 amax, float amax_min) {
  const u32 least = bits_of(amax_min);
  return float_of(amax > least ? amax : least) / QMAX<Q>;
}
