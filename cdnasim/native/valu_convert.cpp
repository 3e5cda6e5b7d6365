// Vector conversions between number formats. fp8 means the flavour of the architecture: FNUZ on
// gfx942, OCP on gfx950. MODE.FP16_OVFL makes conversions to fp8 saturate instead of overflowing.
#include "operands.hpp"

namespace cdnasim {

// ---- f32 and integers
#define CVT_TO_FLOAT(name, e) VALU_F(1, name, FLOAT_CLAMP, (u32 a), as_bits((float)(e)))
#define CVT_FROM_FLOAT(name, e) \
  VALU_F(1, name, 0, (u32 a), ([](float x) -> u32 { return e; })(as_float(a)))
CVT_TO_FLOAT(v_cvt_f32_i32, (i32)a)
CVT_TO_FLOAT(v_cvt_f32_u32, a)
CVT_FROM_FLOAT(v_cvt_u32_f32, float_to_u32(x))
CVT_FROM_FLOAT(v_cvt_i32_f32, float_to_i32(x))
CVT_FROM_FLOAT(v_cvt_rpi_i32_f32, float_to_i32(floorf(x + .5f)))
CVT_FROM_FLOAT(v_cvt_flr_i32_f32, float_to_i32(floorf(x)))
#define CVT_UBYTE(name, shift)                                                            \
  VALU_TF(1, name, FLOAT_CLAMP, (u32 a), (U a, U ta), as_bits((float)(a >> shift & 255)), \
          spread(ta >> shift & 255))
CVT_UBYTE(v_cvt_f32_ubyte0, 0)
CVT_UBYTE(v_cvt_f32_ubyte1, 8)
CVT_UBYTE(v_cvt_f32_ubyte2, 16)
CVT_UBYTE(v_cvt_f32_ubyte3, 24)
VALU1(v_cvt_off_f32_i4, as_bits((float)sign_extend(a & 15, 4) / 16))

// ---- f16, bf16. A conversion from 16 bits reads the low half only.
VALU_F(1, v_cvt_f16_f32, HALF_RESULT | FLOAT_CLAMP, (u32 a), float_to_half(as_float(a)))
VALU_TF(1, v_cvt_f32_f16, HALF_SIGN | HALF_SOURCE | FLOAT_CLAMP, (u32 a), (U a, U ta),
        as_bits(half_to_float(a & 0xffff)), spread(ta & 0xffff))
VALU_TF(1, v_cvt_f32_bf16, HALF_SIGN | HALF_SOURCE, (u32 a), (U a, U ta), a << 16, ta << 16)
#define HALF_FROM(name, e) VALU_F(1, name, HALF_SOURCE | HALF_RESULT, (u32 a), e)
HALF_FROM(v_cvt_f16_u16, float_to_half((float)(a & 0xffff)))
HALF_FROM(v_cvt_f16_i16, float_to_half((float)(i16)a))
static u32 limit(float x, float low, float high) {
  return x != x ? 0 : (u32)(i32)(x < low ? low : x > high ? high : x);
}
#define HALF_TO(name, low, high)                                  \
  VALU_F(1, name, HALF_SIGN | HALF_SOURCE | HALF_RESULT, (u32 a), \
         limit(half_to_float(a & 0xffff), low, high) & 0xffff)
HALF_TO(v_cvt_u16_f16, 0, 65535)
HALF_TO(v_cvt_i16_f16, -32768, 32767)

// Two sources into the halves of one register.
#define PACK2(name, flags, convert)                               \
  VALU_TF(2, name, flags, (u32 a, u32 b), (U a, U b, U ta, U tb), \
          (convert(a) & 0xffff) | convert(b) << 16, (ta ? 0xffff : 0) | (tb ? 0xffff0000 : 0))
static u32 pack_bf16(u32 x) { return float_to_bf16(as_float(x)); }
static u32 pack_half_rtz(u32 x) { return float_to_half_rtz(as_float(x)); }
static u32 pack_i16(u32 x) { return (i32)x > 32767 ? 32767 : (i32)x < -32768 ? 0x8000 : x; }
static u32 pack_u16(u32 x) { return x > 65535 ? 65535 : x; }
static u32 pack_snorm(u32 x) {
  return limit(rintf(med3_f32(as_float(x), -1, 1) * 32767), -32767, 32767);
}
static u32 pack_unorm(u32 x) { return limit(rintf(med3_f32(as_float(x), 0, 1) * 65535), 0, 65535); }
PACK2(v_cvt_pk_bf16_f32, 0, pack_bf16)
PACK2(v_cvt_pk_f16_f32, 0, ([](u32 x) { return float_to_half(as_float(x)); }))
PACK2(v_cvt_pkrtz_f16_f32, 0, pack_half_rtz)
PACK2(v_cvt_pk_i16_i32, 0, pack_i16)
PACK2(v_cvt_pk_u16_u32, 0, pack_u16)
PACK2(v_cvt_pknorm_i16_f32, 0, pack_snorm)
PACK2(v_cvt_pknorm_u16_f32, 0, pack_unorm)
// Byte b[1:0] of c is replaced by a.
VALU3(v_cvt_pk_u8_f32, (c & ~(255u << 8 * (b & 3))) | limit(as_float(a), 0, 255) << 8 * (b & 3))

// ---- f64
#define FROM_DOUBLE(name, e)              \
  OP(name, VALU | WIDE64, 1, taint_any) { \
    Lanes64 a;                            \
    Lanes r;                              \
    source64(w, I, 1, a);                 \
    FOR_LANES {                           \
      double x = as_double(a.at[lane]);   \
      r.at[lane] = (e);                   \
    }                                     \
    blend(w, w.v[I.args[0].index], r.at); \
  }
FROM_DOUBLE(v_cvt_f32_f64, as_bits((float)x))
FROM_DOUBLE(v_cvt_i32_f64, x != x              ? 0
                           : x >= 2147483647.  ? 0x7fffffff
                           : x <= -2147483648. ? 0x80000000
                                               : (u32)(i32)x)
FROM_DOUBLE(v_cvt_u32_f64, !(x > 0) ? 0 : x >= 4294967295. ? ~0u : (u32)x)
#define TO_DOUBLE(name, e)                        \
  OP(name, VALU, 1, taint_any) {                  \
    Lanes s0;                                     \
    Lanes64 r;                                    \
    const u32* source_bits = source(w, I, 1, s0); \
    FOR_LANES {                                   \
      u32 a = source_bits[lane];                  \
      r.at[lane] = as_bits64((double)(e));        \
    }                                             \
    finish64(w, I, r);                            \
  }
TO_DOUBLE(v_cvt_f64_f32, as_float(a))
TO_DOUBLE(v_cvt_f64_i32, (i32)a)
TO_DOUBLE(v_cvt_f64_u32, a)

// ---- from fp8: one byte (SDWA picks another), or two bytes of a half
#define FROM_FP8(name, e5m2)                                              \
  static void taint_##name(Wave& w, const Ins& I) {                       \
    taint1(w, I, [](u32, u32 ta) { return spread(ta & 255); });           \
  }                                                                       \
  OP(name, VALU | FLOAT_CLAMP, 1, taint_##name) {                         \
    int flavour = w.fp8_flavour(e5m2);                                    \
    map1(w, I, [=](u32 a) { return as_bits(fp8_to_float(a, flavour)); }); \
  }
FROM_FP8(v_cvt_f32_fp8, false)
FROM_FP8(v_cvt_f32_bf8, true)
template <bool E5M2>
static void pair_from_fp8(Wave& w, const Ins& I) {
  Lanes s0, low, high;
  const u32* a = source(w, I, 1, s0);
  int flavour = w.fp8_flavour(E5M2), shift = I.mods.op_sel & 1 ? 16 : 0;
  FOR_LANES {
    low.at[lane] = as_bits(fp8_to_float(a[lane] >> shift, flavour));
    high.at[lane] = as_bits(fp8_to_float(a[lane] >> shift >> 8, flavour));
  }
  blend(w, w.v[I.args[0].index], low.at);
  blend(w, w.v[I.args[0].index + 1], high.at);
}
static void taint_pair_from_fp8(Wave& w, const Ins& I) {
  Lanes t0, low, high;
  const u32* ta = source_undefined(w, I, 1, 0, t0);
  int shift = I.mods.op_sel & 1 ? 16 : 0;
  FOR_LANES {
    low.at[lane] = spread(ta[lane] >> shift & 255);
    high.at[lane] = spread(ta[lane] >> shift >> 8 & 255);
  }
  finish_undefined(w, I, low, 0);
  finish_undefined(w, I, high, 1);
}
OP(v_cvt_pk_f32_fp8, VALU, 1, taint_pair_from_fp8) { pair_from_fp8<false>(w, I); }
OP(v_cvt_pk_f32_bf8, VALU, 1, taint_pair_from_fp8) { pair_from_fp8<true>(w, I); }

// ---- to fp8: op_sel[3] picks the half of the destination, the other half is kept
static void write_part(Wave& w, const Ins& I, const Lanes& part, int bits, int shift) {
  u32 field = (u32)((1ull << bits) - 1) << shift;
  u32* d = w.v[I.args[0].index];
  u64 exec = w.exec();
  FOR_LANES if (exec >> lane & 1) d[lane] = (d[lane] & ~field) | (part.at[lane] << shift & field);
}
static void write_part_undefined(Wave& w, const Ins& I, const Lanes& t, int bits, int shift) {
  u32 field = (u32)((1ull << bits) - 1) << shift;
  Lanes merged;
  FOR_LANES merged.at[lane] =
      (w.undefined[I.args[0].index][lane] & ~field) | (spread(t.at[lane]) & field);
  finish_undefined(w, I, merged);
}
static Lanes undefined_sources(Wave& w, const Ins& I) {
  Lanes all = {}, scratch;
  for (int k = 1; k < I.nargs; k++)
    for (int d = 0; d < I.args[k].count; d++) {
      const u32* t = source_undefined(w, I, k, d, scratch);
      FOR_LANES all.at[lane] |= t[lane];
    }
  return all;
}
static int half_shift(const Ins& I) { return I.mods.op_sel & 8 ? 16 : 0; }
static int byte_shift(const Ins& I) { return 8 * (I.mods.op_sel >> 2 & 3); }
static void taint_half(Wave& w, const Ins& I) {
  write_part_undefined(w, I, undefined_sources(w, I), 16, half_shift(I));
}
static void taint_byte(Wave& w, const Ins& I) {
  write_part_undefined(w, I, undefined_sources(w, I), 8, byte_shift(I));
}
static u32 pair_to_fp8(float x, float y, int flavour, bool saturate) {
  return float_to_fp8(x, flavour, saturate) | float_to_fp8(y, flavour, saturate) << 8;
}
#define TO_FP8(name, e5m2)                                                    \
  OP(name, VALU | READS_DST, 1, taint_half) {                                 \
    Lanes s0, s1, part;                                                       \
    const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);             \
    int flavour = w.fp8_flavour(e5m2);                                        \
    bool saturate = w.saturates();                                            \
    FOR_LANES part.at[lane] =                                                 \
        pair_to_fp8(as_float(a[lane]), as_float(b[lane]), flavour, saturate); \
    write_part(w, I, part, 16, half_shift(I));                                \
  }
TO_FP8(v_cvt_pk_fp8_f32, false)
TO_FP8(v_cvt_pk_bf8_f32, true)

// Stochastic rounding: the second source's bits are added below the last mantissa bit kept.
#define TO_FP8_STOCHASTIC(name, e5m2)                                                    \
  OP(name, VALU | READS_DST, 1, taint_byte) {                                            \
    Lanes s0, s1, part;                                                                  \
    const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);                        \
    int flavour = w.fp8_flavour(e5m2), dropped = 23 - fp8_format(flavour).mantissa_bits; \
    bool saturate = w.saturates();                                                       \
    FOR_LANES {                                                                          \
      u32 bits = a[lane];                                                                \
      if ((bits & 0x7f800000) != 0x7f800000)                                             \
        bits = (bits + (b[lane] >> (32 - dropped))) & ~((1u << dropped) - 1);            \
      part.at[lane] = float_to_fp8(as_float(bits), flavour, saturate);                   \
    }                                                                                    \
    write_part(w, I, part, 8, byte_shift(I));                                            \
  }
TO_FP8_STOCHASTIC(v_cvt_sr_fp8_f32, false)
TO_FP8_STOCHASTIC(v_cvt_sr_bf8_f32, true)

// ---- gfx950 scaled conversions. The scale operand is an f32 of which only the exponent counts;
// conversions to a small format divide by it, conversions from one multiply.
static int scale_exponent(u32 scale) { return (int)(scale >> 23 & 255) - 127; }
enum Small { FP8 = E4M3_OCP, BF8 = E5M2_OCP, FP4 = 4 };
static u32 to_small(float x, int format, bool saturate) {
  return format == FP4 ? float_to_fp4(x) : float_to_fp8(x, format, saturate);
}
static float from_small(u32 bits, int format) {
  return format == FP4 ? tables().fp4[bits & 15] : fp8_to_float(bits, format);
}
static float from_half_word(u32 half, bool bf16) {
  return bf16 ? bf16_to_float(half & 0xffff) : half_to_float(half & 0xffff);
}
template <int FORMAT>
static void write_small(Wave& w, const Ins& I, const Lanes& x, const Lanes& y, const u32* scale) {
  Lanes part;
  bool saturate = w.saturates();
  int width = FORMAT == FP4 ? 4 : 8;
  FOR_LANES {
    int e = -scale_exponent(scale[lane]);
    part.at[lane] = to_small(ldexpf(as_float(x.at[lane]), e), FORMAT, saturate) |
                    to_small(ldexpf(as_float(y.at[lane]), e), FORMAT, saturate) << width;
  }
  write_part(w, I, part, 2 * width, FORMAT == FP4 ? byte_shift(I) : half_shift(I));
}
#define SCALED_FROM_F32(name, format, taint)              \
  OP(name, VALU | READS_DST, 1, taint) {                  \
    Lanes s0, s1, s2, x, y;                               \
    memcpy(x.at, source(w, I, 1, s0), sizeof x.at);       \
    memcpy(y.at, source(w, I, 2, s1), sizeof y.at);       \
    write_small<format>(w, I, x, y, source(w, I, 3, s2)); \
  }
SCALED_FROM_F32(v_cvt_scalef32_pk_fp8_f32, FP8, taint_half)
SCALED_FROM_F32(v_cvt_scalef32_pk_bf8_f32, BF8, taint_half)
SCALED_FROM_F32(v_cvt_scalef32_pk_fp4_f32, FP4, taint_byte)
#define SCALED_FROM_HALVES(name, format, bf16, taint)            \
  OP(name, VALU | READS_DST, 1, taint) {                         \
    Lanes s0, s1, x, y;                                          \
    const u32* a = source(w, I, 1, s0);                          \
    FOR_LANES {                                                  \
      x.at[lane] = as_bits(from_half_word(a[lane], bf16));       \
      y.at[lane] = as_bits(from_half_word(a[lane] >> 16, bf16)); \
    }                                                            \
    write_small<format>(w, I, x, y, source(w, I, 2, s1));        \
  }
SCALED_FROM_HALVES(v_cvt_scalef32_pk_fp8_bf16, FP8, true, taint_half)
SCALED_FROM_HALVES(v_cvt_scalef32_pk_bf8_bf16, BF8, true, taint_half)
SCALED_FROM_HALVES(v_cvt_scalef32_pk_fp4_bf16, FP4, true, taint_byte)
SCALED_FROM_HALVES(v_cvt_scalef32_pk_fp8_f16, FP8, false, taint_half)
SCALED_FROM_HALVES(v_cvt_scalef32_pk_bf8_f16, BF8, false, taint_half)
SCALED_FROM_HALVES(v_cvt_scalef32_pk_fp4_f16, FP4, false, taint_byte)

// From a pair: op_sel[0] picks the half (fp8), op_sel[1:0] the byte (fp4). Results are two f32
// registers or one register of two 16-bit values.
enum Target { TO_F32, TO_BF16, TO_F16 };
template <int FORMAT, Target TARGET>
static void scaled_pair(Wave& w, const Ins& I) {
  Lanes s0, s1, low, high;
  const u32 *a = source(w, I, 1, s0), *scale = source(w, I, 2, s1);
  int width = FORMAT == FP4 ? 4 : 8;
  int shift = FORMAT == FP4 ? 8 * ((I.mods.op_sel & 1) | (I.mods.op_sel >> 1 & 1) << 1)
                            : 16 * (I.mods.op_sel & 1);
  FOR_LANES {
    int e = scale_exponent(scale[lane]);
    float x = ldexpf(from_small(a[lane] >> shift, FORMAT), e);
    float y = ldexpf(from_small(a[lane] >> shift >> width, FORMAT), e);
    if (TARGET == TO_F32) low.at[lane] = as_bits(x), high.at[lane] = as_bits(y);
    if (TARGET == TO_BF16) low.at[lane] = float_to_bf16(x) | float_to_bf16(y) << 16;
    if (TARGET == TO_F16) low.at[lane] = float_to_half(x) | float_to_half(y) << 16;
  }
  blend(w, w.v[I.args[0].index], low.at);
  if (TARGET == TO_F32) blend(w, w.v[I.args[0].index + 1], high.at);
}
#define SCALED_PAIRS(small, format)                                                              \
  OP(v_cvt_scalef32_pk_f32_##small, VALU, 1, taint_any) { scaled_pair<format, TO_F32>(w, I); }   \
  OP(v_cvt_scalef32_pk_bf16_##small, VALU, 1, taint_any) { scaled_pair<format, TO_BF16>(w, I); } \
  OP(v_cvt_scalef32_pk_f16_##small, VALU, 1, taint_any) { scaled_pair<format, TO_F16>(w, I); }
SCALED_PAIRS(fp8, FP8)
SCALED_PAIRS(bf8, BF8)
SCALED_PAIRS(fp4, FP4)
#define SCALED_SINGLE(name, format)                                                         \
  OP(name, VALU, 1, taint_any) {                                                            \
    Lanes s0, s1, r;                                                                        \
    const u32 *a = source(w, I, 1, s0), *scale = source(w, I, 2, s1);                       \
    int shift = 8 * (I.mods.op_sel & 3);                                                    \
    FOR_LANES r.at[lane] =                                                                  \
        as_bits(ldexpf(from_small(a[lane] >> shift, format), scale_exponent(scale[lane]))); \
    blend(w, w.v[I.args[0].index], r.at);                                                   \
  }
SCALED_SINGLE(v_cvt_scalef32_f32_fp8, FP8)
SCALED_SINGLE(v_cvt_scalef32_f32_bf8, BF8)

}  // namespace cdnasim
