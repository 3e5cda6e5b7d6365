// Number formats: bf16, f16, the four fp8 flavours, fp6, fp4, e8m0, and float functions with the
// hardware's treatment of NaN and signed zero.
#pragma once
#include <cmath>

#include "types.hpp"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace cdnasim {

inline float bf16_to_float(u32 bits) { return as_float(bits << 16); }

// Round to nearest even; a NaN stays a NaN.
inline u32 float_to_bf16(float value) {
  u32 bits = as_bits(value);
  if (value != value) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#ifdef __F16C__
inline float half_to_float(u32 bits) { return _cvtsh_ss((u16)bits); }
inline u32 float_to_half(float value) { return _cvtss_sh(value, 0); }
#else
inline float half_to_float(u32 bits) {
  u32 sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return as_float(sign | as_bits((float)mantissa * 5.9604644775390625e-8f));
  return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline u32 float_to_half(float value) {
  u32 sign = as_bits(value) >> 16 & 0x8000;
  float magnitude = fabsf(value);
  if (value != value) return sign | 0x7e00;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
  if (exponent < -14) exponent = -14;
  u32 steps = (u32)nearbyintf(ldexpf(magnitude, 10 - exponent));  // 1.0 is 1024 steps
  return sign | (((u32)(exponent + 14) << 10) + steps);
}
#endif

// Round towards zero; overflow gives the largest finite value.
inline u32 float_to_half_rtz(float value) {
  u32 half = float_to_half(value);
  if (value == value && !std::isinf(value) && fabsf(half_to_float(half)) > fabsf(value)) half--;
  return half;
}

// gfx942 computes in the FNUZ flavours (no infinity, no -0, one NaN), gfx950 in the OCP ones.
enum Fp8 { E4M3_FNUZ = 0, E5M2_FNUZ = 1, E4M3_OCP = 2, E5M2_OCP = 3 };

struct Fp8Format {
  int mantissa_bits, exponent_bits, bias;
  u32 largest, nan, overflow;  // codes of magnitudes; `overflow` when not saturating
  bool fnuz;
};

inline Fp8Format fp8_format(int flavour) {
  bool fnuz = flavour < 2;
  int mantissa = flavour & 1 ? 2 : 3, exponent = 7 - mantissa;
  int bias = (1 << (exponent - 1)) - (fnuz ? 0 : 1);
  if (fnuz) return {mantissa, exponent, bias, 0x7f, 0x80, 0x80, true};
  if (flavour == E4M3_OCP) return {mantissa, exponent, bias, 0x7e, 0x7f, 0x7f, false};
  return {mantissa, exponent, bias, 0x7b, 0x7f, 0x7c, false};
}

inline float decode_minifloat(u32 bits, int mantissa_bits, int exponent_bits, int bias) {
  u32 mantissa = bits & ((1 << mantissa_bits) - 1);
  int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  float unit = 1.f / (1 << mantissa_bits);
  float magnitude =
      exponent ? ldexpf(1 + mantissa * unit, exponent - bias) : ldexpf(mantissa * unit, 1 - bias);
  return bits >> (mantissa_bits + exponent_bits) & 1 ? -magnitude : magnitude;
}

struct MinifloatTables {
  float fp8[4][256];
  float fp6_e2m3[64], fp6_e3m2[64], fp4[16];
  MinifloatTables() {
    for (int flavour = 0; flavour < 4; flavour++) {
      Fp8Format f = fp8_format(flavour);
      for (int bits = 0; bits < 256; bits++) {
        float value = decode_minifloat(bits, f.mantissa_bits, f.exponent_bits, f.bias);
        int magnitude = bits & 127;
        if (f.fnuz && bits == 128) value = NAN;
        if (flavour == E4M3_OCP && magnitude == 127) value = NAN;
        if (flavour == E5M2_OCP && magnitude > 124) value = NAN;
        if (flavour == E5M2_OCP && magnitude == 124) value = bits & 128 ? -INFINITY : INFINITY;
        fp8[flavour][bits] = value;
      }
    }
    for (int bits = 0; bits < 64; bits++) {
      fp6_e2m3[bits] = decode_minifloat(bits, 3, 2, 1);
      fp6_e3m2[bits] = decode_minifloat(bits, 2, 3, 3);
    }
    for (int bits = 0; bits < 16; bits++) fp4[bits] = decode_minifloat(bits, 1, 2, 1);
  }
};
inline const MinifloatTables& tables() {
  static const MinifloatTables instance;
  return instance;
}
inline float fp8_to_float(u32 bits, int flavour) { return tables().fp8[flavour][bits & 255]; }

// Round to nearest even. Without saturation an overflow becomes NaN (FNUZ, e4m3) or infinity.
inline u32 float_to_fp8(float value, int flavour, bool saturate) {
  Fp8Format f = fp8_format(flavour);
  u32 bits = as_bits(value), sign = bits >> 24 & 128, magnitude = bits & 0x7fffffff;
  int dropped = 23 - f.mantissa_bits;
  u32 rounded = (magnitude + (1u << (dropped - 1)) - 1 + (magnitude >> dropped & 1)) >> dropped;
  u32 normal = rounded - ((u32)(127 - f.bias) << f.mantissa_bits);
  float steps = as_float((u32)(126 + f.bias + f.mantissa_bits) << 23);  // subnormal codes per 1.0
  u32 subnormal = (u32)__builtin_rintf(as_float(magnitude < 0x3f800000 ? magnitude : 0) * steps);
  u32 code = magnitude < (u32)(128 - f.bias) << 23 ? subnormal : normal;
  u32 overflow = saturate ? f.largest : f.overflow;
  code = magnitude >= 0x7f800000 || code > f.largest ? overflow : code;
  code = magnitude > 0x7f800000 ? f.nan : code;
  return f.fnuz && (code == 0 || code == 0x80) ? code : code | sign;
}

// fp4 e2m1, round to nearest even, saturating at 6 (the format has neither infinity nor NaN).
inline u32 float_to_fp4(float value) {
  float magnitude = fabsf(value);
  u32 best = 0;
  if (!(magnitude < 6)) best = 7;
  else
    for (u32 code = 1; code < 8; code++) {
      float gap = fabsf(tables().fp4[code] - magnitude),
            old = fabsf(tables().fp4[best] - magnitude);
      if (gap < old || (gap == old && !(code & 1))) best = code;
    }
  return best | (std::signbit(value) ? 8 : 0);
}

inline float e8m0_to_float(u32 bits) { return bits == 255 ? NAN : ldexpf(1.f, (int)bits - 127); }

// maxNum / minNum with max(+0, -0) = +0, as the hardware orders zeros.
inline float max_f32(float a, float b) {
  float equal = as_float(as_bits(a) & as_bits(b));
  float ordered = a > b ? a : b > a ? b : equal;
  return a != a ? b : b != b ? a : ordered;
}
inline float min_f32(float a, float b) {
  float equal = as_float(as_bits(a) | as_bits(b));
  float ordered = a < b ? a : b < a ? b : equal;
  return a != a ? b : b != b ? a : ordered;
}
inline float med3_f32(float a, float b, float c) {
  if (a != a || b != b || c != c) return min_f32(min_f32(a, b), c);
  return max_f32(min_f32(a, b), min_f32(max_f32(a, b), c));
}

// 2^x without a libm call, so that the lane loop vectorises; within 1 ulp of the exact value.
inline float exp2_f32(float x) {
  float clamped = x < -160.f ? -160.f : x > 160.f ? 160.f : x;
  double whole = __builtin_rint((double)clamped), y = (clamped - whole) * 0.6931471805599453;
  double p =
      1 +
      y * (1 +
           y * (1. / 2 +
                y * (1. / 6 +
                     y * (1. / 24 +
                          y * (1. / 120 + y * (1. / 720 + y * (1. / 5040 + y * (1. / 40320))))))));
  double scale = as_double((u64)((i64)whole + 1023) << 52);
  return x != x ? x : (float)(p * scale);
}

// Saturating conversions; NaN gives zero.
inline u32 float_to_i32(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.f) return 0x7fffffff;
  if (x <= -2147483648.f) return 0x80000000;
  return (u32)(i32)x;
}
inline u32 float_to_u32(float x) {
  if (!(x > 0)) return 0;
  return x >= 4294967296.f ? ~0u : (u32)x;
}

inline u32 reverse_bits(u32 x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(x);
}
inline i32 sign_extend(u32 x, int bits) { return (i32)(x << (32 - bits)) >> (32 - bits); }

}  // namespace cdnasim
