// Vector float arithmetic: f32, f16, f64. Transcendentals use the host's functions rounded to
// f32; the hardware is within 1 ulp of the same value.
#include "operands.hpp"

namespace cdnasim {

#define FLOAT1(name, e) \
  VALU_F(1, name, FLOAT_CLAMP, (u32 a), ([](float x) -> u32 { return as_bits(e); })(as_float(a)))
#define FLOAT2(name, e)                        \
  VALU_F(2, name, FLOAT_CLAMP, (u32 a, u32 b), \
         ([](float x, float y) -> u32 { return as_bits(e); })(as_float(a), as_float(b)))
#define FLOAT3(name, e)                                                                       \
  VALU_F(3, name, FLOAT_CLAMP, (u32 a, u32 b, u32 c), ([](float x, float y, float z) -> u32 { \
           return as_bits(e);                                                                 \
         })(as_float(a), as_float(b), as_float(c)))
#define TRANS1(name, e)                         \
  VALU_F(1, name, FLOAT_CLAMP | TRANS, (u32 a), \
         ([](float x) -> u32 { return as_bits(e); })(as_float(a)))

// ---- f32
FLOAT2(v_add_f32, x + y)
FLOAT2(v_sub_f32, x - y)
FLOAT2(v_subrev_f32, y - x)
FLOAT2(v_mul_f32, x * y)
FLOAT2(v_mul_legacy_f32, x == 0 || y == 0 ? 0.f : x * y)
FLOAT2(v_max_f32, max_f32(x, y))
FLOAT2(v_min_f32, min_f32(x, y))
FLOAT3(v_fma_f32, fmaf(x, y, z))
FLOAT3(v_fmamk_f32, fmaf(x, y, z))
FLOAT3(v_fmaak_f32, fmaf(x, y, z))
FLOAT3(v_max3_f32, max_f32(max_f32(x, y), z))
FLOAT3(v_min3_f32, min_f32(min_f32(x, y), z))
FLOAT3(v_med3_f32, med3_f32(x, y, z))
static float minimum_f32(float x, float y) { return x != x ? x : y != y ? y : min_f32(x, y); }
static float maximum_f32(float x, float y) { return x != x ? x : y != y ? y : max_f32(x, y); }
FLOAT3(v_minimum3_f32, minimum_f32(minimum_f32(x, y), z))
FLOAT3(v_maximum3_f32, maximum_f32(maximum_f32(x, y), z))
FLOAT1(v_floor_f32, floorf(x))
FLOAT1(v_ceil_f32, ceilf(x))
FLOAT1(v_trunc_f32, truncf(x))
FLOAT1(v_rndne_f32, rintf(x))
FLOAT1(v_fract_f32, min_f32(x - floorf(x), 0.99999994f))
FLOAT1(v_frexp_mant_f32, std::isfinite(x) && x != 0 ? frexpf(x,
                                                             [] {
                                                               static thread_local int e;
                                                               return &e;
                                                             }())
                                                    : x)
static i32 exponent_of(float x) {
  int e = 0;
  if (std::isfinite(x) && x != 0) frexpf(x, &e);
  return e;
}
VALU1(v_frexp_exp_i32_f32, (u32)exponent_of(as_float(a)))
VALU_F(2, v_ldexp_f32, FLOAT_CLAMP, (u32 a, u32 b), as_bits(ldexpf(as_float(a), (i32)b)))

// v_fmac: the destination is the addend; VOP2 and VOP3 forms alike.
OP(v_fmac_f32, VALU | FLOAT_CLAMP | READS_DST, 1, taint_any) {
  Lanes s0, s1, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1), *d = w.v[I.args[0].index];
  FOR_LANES result.at[lane] =
      as_bits(fmaf(as_float(a[lane]), as_float(b[lane]), as_float(d[lane])));
  finish(w, I, result);
}

TRANS1(v_exp_f32, exp2_f32(x))
TRANS1(v_log_f32, log2f(x))
TRANS1(v_rcp_f32, 1.f / x)
TRANS1(v_rcp_iflag_f32, 1.f / x)
TRANS1(v_rsq_f32, 1.f / sqrtf(x))
TRANS1(v_sqrt_f32, sqrtf(x))
constexpr double TURN = 6.283185307179586;
TRANS1(v_sin_f32, (float)sin(x* TURN))
TRANS1(v_cos_f32, (float)cos(x* TURN))

// ---- division: v_div_scale, v_div_fmas and v_div_fixup as in the ISA document's pseudo-code.
static bool is_denormal(float x) { return x != 0 && fabsf(x) < 1.17549435e-38f; }
static int biased_exponent(float x) { return as_bits(x) >> 23 & 255; }
static u32 div_scale(float x, float denominator, float numerator, bool& vcc) {
  vcc = false;
  float scaled_up = x * 0x1p64f, scaled_down = x * 0x1p-64f;
  bool is_denominator = as_bits(x) == as_bits(denominator);
  bool is_numerator = as_bits(x) == as_bits(numerator);
  if (numerator == 0 || denominator == 0) return as_bits(NAN);
  if (biased_exponent(numerator) - biased_exponent(denominator) >= 96) {
    vcc = true;
    return as_bits(is_denominator ? scaled_up : x);
  }
  if (is_denormal(denominator)) return as_bits(scaled_up);
  bool tiny_reciprocal = fabs(1.0 / (double)denominator) < 1.1754943508222875e-38;
  double quotient = (double)numerator / (double)denominator;
  bool tiny_quotient = fabs(quotient) < 1.1754943508222875e-38;
  if (tiny_reciprocal && tiny_quotient) {
    vcc = true;
    return as_bits(is_denominator ? scaled_up : x);
  }
  if (tiny_reciprocal) return as_bits(scaled_down);
  if (tiny_quotient) {
    vcc = true;
    return as_bits(is_numerator ? scaled_up : x);
  }
  if (biased_exponent(numerator) <= 23) return as_bits(scaled_up);
  return as_bits(x);
}
OP(v_div_scale_f32, VALU, 2, taint_any) {
  Lanes s0, s1, s2, result;
  const u32 *a = source(w, I, 2, s0), *b = source(w, I, 3, s1), *c = source(w, I, 4, s2);
  u64 mask = 0;
  FOR_LANES {
    bool vcc;
    result.at[lane] = div_scale(as_float(a[lane]), as_float(b[lane]), as_float(c[lane]), vcc);
    mask |= (u64)vcc << lane;
  }
  finish(w, I, result);
  set_scalar64(w, I.args[1], mask & w.exec());
}
OP(v_div_fmas_f32, VALU | FLOAT_CLAMP | READS_VCC | DIV_FMAS, 1, taint_any) {
  Lanes s0, s1, s2, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1), *c = source(w, I, 3, s2);
  u64 vcc = w.vcc();
  FOR_LANES {
    float r = fmaf(as_float(a[lane]), as_float(b[lane]), as_float(c[lane]));
    if (vcc >> lane & 1) r *= biased_exponent(as_float(c[lane])) > 127 ? 0x1p64f : 0x1p-64f;
    result.at[lane] = as_bits(r);
  }
  finish(w, I, result);
}
static u32 div_fixup(float quotient, float denominator, float numerator) {
  u32 sign = (as_bits(denominator) ^ as_bits(numerator)) & 0x80000000;
  if (numerator != numerator) return as_bits(numerator) | 0x400000;
  if (denominator != denominator) return as_bits(denominator) | 0x400000;
  if (denominator == 0 && numerator == 0) return 0xffc00000;
  if (std::isinf(denominator) && std::isinf(numerator)) return 0xffc00000;
  if (denominator == 0 || std::isinf(numerator)) return sign | 0x7f800000;
  if (std::isinf(denominator) || numerator == 0) return sign;
  return (as_bits(quotient) & 0x7fffffff) | sign;
}
VALU_F(3, v_div_fixup_f32, FLOAT_CLAMP, (u32 a, u32 b, u32 c),
       div_fixup(as_float(a), as_float(b), as_float(c)))

// ---- f16: computed in f32 and rounded once (exact for one addition or product); fma in f64
#define HALF (HALF_SIGN | HALF_SOURCE | HALF_RESULT | FLOAT_CLAMP)
#define HALF1(name, e)           \
  VALU_F(1, name, HALF, (u32 a), \
         ([](float x) -> u32 { return float_to_half(e); })(half_to_float(a & 0xffff)))
#define HALF1_TRANS(name, e)             \
  VALU_F(1, name, HALF | TRANS, (u32 a), \
         ([](float x) -> u32 { return float_to_half(e); })(half_to_float(a & 0xffff)))
#define HALF2(name, e)                                                 \
  VALU_F(2, name, HALF, (u32 a, u32 b), ([](float x, float y) -> u32 { \
           return float_to_half(e);                                    \
         })(half_to_float(a & 0xffff), half_to_float(b & 0xffff)))
#define HALF3(name, e)                                                        \
  VALU_F(3, name, HALF | KEEPS_HIGH, (u32 a, u32 b, u32 c),                   \
         ([](float x, float y, float z) -> u32 { return float_to_half(e); })( \
             half_to_float(a & 0xffff), half_to_float(b & 0xffff), half_to_float(c & 0xffff)))
HALF2(v_add_f16, x + y)
HALF2(v_sub_f16, x - y)
HALF2(v_subrev_f16, y - x)
HALF2(v_mul_f16, x * y)
HALF2(v_max_f16, max_f32(x, y))
HALF2(v_min_f16, min_f32(x, y))
HALF3(v_fma_f16, (float)((double)x * y + z))
HALF3(v_max3_f16, max_f32(max_f32(x, y), z))
HALF3(v_min3_f16, min_f32(min_f32(x, y), z))
HALF3(v_med3_f16, med3_f32(x, y, z))
HALF1(v_floor_f16, floorf(x))
HALF1(v_ceil_f16, ceilf(x))
HALF1(v_trunc_f16, truncf(x))
HALF1(v_rndne_f16, rintf(x))
HALF1_TRANS(v_exp_f16, exp2_f32(x))
HALF1_TRANS(v_log_f16, log2f(x))
HALF1_TRANS(v_rcp_f16, 1.f / x)
HALF1_TRANS(v_rsq_f16, 1.f / sqrtf(x))
HALF1_TRANS(v_sqrt_f16, sqrtf(x))

// ---- f64
template <class F>
static void double1(Wave& w, const Ins& I, F f) {
  Lanes64 a, r;
  source64(w, I, 1, a);
  FOR_LANES r.at[lane] = as_bits64(f(as_double(a.at[lane])));
  finish64(w, I, r);
}
template <class F>
static void double2(Wave& w, const Ins& I, F f) {
  Lanes64 a, b, r;
  source64(w, I, 1, a);
  source64(w, I, 2, b);
  FOR_LANES r.at[lane] = as_bits64(f(as_double(a.at[lane]), as_double(b.at[lane])));
  finish64(w, I, r);
}
#define DOUBLE1(name, e)                       \
  OP(name, VALU | WIDE64, 1, taint_any) {      \
    double1(w, I, [](double x) { return e; }); \
  }
#define DOUBLE2(name, e)                                 \
  OP(name, VALU | WIDE64, 1, taint_any) {                \
    double2(w, I, [](double x, double y) { return e; }); \
  }
DOUBLE2(v_add_f64, x + y)
DOUBLE2(v_mul_f64, x * y)
DOUBLE2(v_max_f64, fmax(x, y))
DOUBLE2(v_min_f64, fmin(x, y))
DOUBLE1(v_floor_f64, floor(x))
DOUBLE1(v_ceil_f64, ceil(x))
DOUBLE1(v_trunc_f64, trunc(x))
DOUBLE1(v_rndne_f64, rint(x))
DOUBLE1(v_rcp_f64, 1 / x)
DOUBLE1(v_rsq_f64, 1 / sqrt(x))
DOUBLE1(v_sqrt_f64, sqrt(x))
OP(v_fma_f64, VALU | WIDE64, 1, taint_any) {
  Lanes64 a, b, c, r;
  source64(w, I, 1, a);
  source64(w, I, 2, b);
  source64(w, I, 3, c);
  FOR_LANES r.at[lane] =
      as_bits64(fma(as_double(a.at[lane]), as_double(b.at[lane]), as_double(c.at[lane])));
  finish64(w, I, r);
}
OP(v_fmac_f64, VALU | WIDE64 | READS_DST, 1, taint_any) {
  Lanes64 a, b, r;
  source64(w, I, 1, a);
  source64(w, I, 2, b);
  int d = I.args[0].index;
  FOR_LANES {
    double addend = as_double(join(w.v[d][lane], w.v[d + 1][lane]));
    r.at[lane] = as_bits64(fma(as_double(a.at[lane]), as_double(b.at[lane]), addend));
  }
  finish64(w, I, r);
}
OP(v_ldexp_f64, VALU | WIDE64, 1, taint_any) {
  Lanes64 a, r;
  Lanes s0;
  source64(w, I, 1, a);
  const u32* b = source(w, I, 2, s0);
  FOR_LANES r.at[lane] = as_bits64(ldexp(as_double(a.at[lane]), (i32)b[lane]));
  finish64(w, I, r);
}

}  // namespace cdnasim
