// Packed operations (VOP3P): two results per lane. op_sel picks the half (or register) of each
// source for the low result, op_sel_hi for the high one; neg_lo and neg_hi negate likewise.
#include "operands.hpp"

namespace cdnasim {

static int chosen(const Ins& I, int k, bool high) {
  return (high ? I.mods.op_sel_hi : I.mods.op_sel) >> (k - 1) & 1;
}
static bool negated(const Ins& I, int k, bool high) {
  return (high ? I.mods.neg_hi : I.mods.neg_lo) >> (k - 1) & 1;
}

// ---- pairs of f32 registers. A constant counts for both results.
static void wide_source(Wave& w, const Ins& I, int k, bool high, Lanes& out,
                        bool undefined = false) {
  const Arg& a = I.args[k];
  int reg = a.index + chosen(I, k, high);
  u32 flip = negated(I, k, high) && !undefined ? 0x80000000 : 0;
  if (a.kind == ARG_VGPR) {
    const u32* p = undefined ? w.undefined[reg] : w.v[reg];
    FOR_LANES out.at[lane] = p[lane] ^ flip;
  } else {
    u32 x = a.kind == ARG_SGPR ? (undefined ? w.s_undefined[reg] : w.s[reg])
            : undefined        ? 0
                               : (u32)a.value;
    FOR_LANES out.at[lane] = x ^ flip;
  }
}
template <class F>
static void wide_pair(Wave& w, const Ins& I, int sources, F f) {
  Lanes x[2][3], r[2];
  for (int high = 0; high < 2; high++) {
    for (int k = 0; k < sources; k++) wide_source(w, I, k + 1, high, x[high][k]);
    FOR_LANES r[high].at[lane] =
        as_bits(f(as_float(x[high][0].at[lane]), as_float(x[high][1].at[lane]),
                  as_float(x[high][sources - 1].at[lane])));
    if (I.mods.clamp)
      FOR_LANES r[high].at[lane] = as_bits(med3_f32(as_float(r[high].at[lane]), 0, 1));
  }
  blend(w, w.v[I.args[0].index], r[0].at);
  blend(w, w.v[I.args[0].index + 1], r[1].at);
}
static void taint_wide(Wave& w, const Ins& I) {
  Lanes t, r[2] = {};
  for (int high = 0; high < 2; high++)
    for (int k = 1; k < I.nargs; k++) {
      wide_source(w, I, k, high, t, true);
      FOR_LANES r[high].at[lane] |= spread(t.at[lane]);
    }
  finish_undefined(w, I, r[0], 0);
  finish_undefined(w, I, r[1], 1);
}
constexpr u64 WIDE = VALU | PACKED | FLOAT_CLAMP;
OP(v_pk_mul_f32, WIDE, 1, taint_wide) {
  wide_pair(w, I, 2, [](float a, float b, float) { return a * b; });
}
OP(v_pk_add_f32, WIDE, 1, taint_wide) {
  wide_pair(w, I, 2, [](float a, float b, float) { return a + b; });
}
OP(v_pk_fma_f32, WIDE, 1, taint_wide) {
  wide_pair(w, I, 3, [](float a, float b, float c) { return fmaf(a, b, c); });
}

// v_pk_mov_b32: low result from source 0 (op_sel[0]), high result from source 1 (op_sel[1]).
static void moved_pair(Wave& w, const Ins& I, Lanes* r, bool undefined) {
  for (int k = 0; k < 2; k++) wide_source(w, I, k + 1, false, r[k], undefined);
}
static void taint_pk_mov(Wave& w, const Ins& I) {
  Lanes r[2];
  moved_pair(w, I, r, true);
  finish_undefined(w, I, r[0], 0);
  finish_undefined(w, I, r[1], 1);
}
OP(v_pk_mov_b32, VALU | PACKED, 1, taint_pk_mov) {
  Lanes r[2];
  moved_pair(w, I, r, false);
  blend(w, w.v[I.args[0].index], r[0].at);
  blend(w, w.v[I.args[0].index + 1], r[1].at);
}

// ---- two 16-bit values in one register
static void half_source(Wave& w, const Ins& I, int k, bool high, bool is_float, Lanes& out,
                        bool undefined = false) {
  Lanes scratch;
  const u32* p = undefined ? source_undefined(w, I, k, 0, scratch) : source(w, I, k, scratch);
  int shift = chosen(I, k, high) ? 16 : 0;
  u32 flip = is_float && !undefined && negated(I, k, high) ? 0x8000 : 0;
  FOR_LANES out.at[lane] = (p[lane] >> shift & 0xffff) ^ flip;
}
template <class F>
static void half_pair(Wave& w, const Ins& I, int sources, bool is_float, F f) {
  Lanes x[3], r = {};
  for (int high = 0; high < 2; high++) {
    for (int k = 0; k < sources; k++) half_source(w, I, k + 1, high, is_float, x[k]);
    FOR_LANES r.at[lane] |=
        (f(x[0].at[lane], x[sources > 1].at[lane], x[sources - 1].at[lane]) & 0xffff) << 16 * high;
  }
  blend(w, w.v[I.args[0].index], r.at);
}
static void taint_halves(Wave& w, const Ins& I) {
  Lanes t, r = {};
  for (int high = 0; high < 2; high++)
    for (int k = 1; k < I.nargs; k++) {
      half_source(w, I, k, high, false, t, true);
      FOR_LANES if (t.at[lane]) r.at[lane] |= 0xffffu << 16 * high;
    }
  finish_undefined(w, I, r);
}
static float limited(float x, bool clamp) { return clamp ? med3_f32(x, 0, 1) : x; }
#define PK_F16(name, sources, e)                                                               \
  OP(name, VALU | PACKED | FLOAT_CLAMP, 1, taint_halves) {                                     \
    bool clamp = I.mods.clamp;                                                                 \
    half_pair(w, I, sources, true, [=](u32 a, u32 b, u32 c) {                                  \
      [[maybe_unused]] float x = half_to_float(a), y = half_to_float(b), z = half_to_float(c); \
      return float_to_half(limited((e), clamp));                                               \
    });                                                                                        \
  }
PK_F16(v_pk_add_f16, 2, x + y)
PK_F16(v_pk_mul_f16, 2, x * y)
PK_F16(v_pk_max_f16, 2, max_f32(x, y))
PK_F16(v_pk_min_f16, 2, min_f32(x, y))
PK_F16(v_pk_fma_f16, 3, (float)((double)x * y + z))
static u32 limit16(i64 x, i64 low, i64 high) { return (u32)(x < low ? low : x > high ? high : x); }
#define PK_INT(name, sources, T, low, high, e)                    \
  OP(name, VALU | PACKED | INT_CLAMP, 1, taint_halves) {          \
    bool clamp = I.mods.clamp;                                    \
    half_pair(w, I, sources, false, [=](u32 ua, u32 ub, u32 uc) { \
      [[maybe_unused]] i64 a = (T)ua, b = (T)ub, c = (T)uc;       \
      i64 r = (e);                                                \
      return clamp ? limit16(r, low, high) : (u32)r;              \
    });                                                           \
  }
#define PK_U16(name, sources, e) PK_INT(name, sources, u16, 0, 65535, e)
#define PK_I16(name, sources, e) PK_INT(name, sources, i16, -32768, 32767, e)
PK_U16(v_pk_add_u16, 2, a + b)
PK_U16(v_pk_sub_u16, 2, a - b)
PK_U16(v_pk_mul_lo_u16, 2, a * b)
PK_U16(v_pk_mad_u16, 3, a * b + c)
PK_U16(v_pk_max_u16, 2, a > b ? a : b)
PK_U16(v_pk_min_u16, 2, a < b ? a : b)
PK_U16(v_pk_lshlrev_b16, 2, b << (a & 15))
PK_U16(v_pk_lshrrev_b16, 2, b >> (a & 15))
PK_I16(v_pk_add_i16, 2, a + b)
PK_I16(v_pk_sub_i16, 2, a - b)
PK_I16(v_pk_mad_i16, 3, a * b + c)
PK_I16(v_pk_max_i16, 2, a > b ? a : b)
PK_I16(v_pk_min_i16, 2, a < b ? a : b)
PK_I16(v_pk_ashrrev_i16, 2, b >> (a & 15))

// ---- fused multiply-add of mixed widths: op_sel_hi says f16, op_sel which half; neg_lo negates,
// neg_hi takes the absolute value.
static float mixed_source(const Ins& I, int k, u32 word) {
  bool is_half = I.mods.op_sel_hi >> (k - 1) & 1;
  int shift = chosen(I, k, false) ? 16 : 0;
  float x = is_half ? half_to_float(word >> shift & 0xffff) : as_float(word);
  if (I.mods.neg_hi >> (k - 1) & 1) x = fabsf(x);
  return I.mods.neg_lo >> (k - 1) & 1 ? -x : x;
}
static Lanes mixed_fma(Wave& w, const Ins& I) {
  Lanes s0, s1, s2, r;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1), *c = source(w, I, 3, s2);
  FOR_LANES {
    float x =
        fmaf(mixed_source(I, 1, a[lane]), mixed_source(I, 2, b[lane]), mixed_source(I, 3, c[lane]));
    r.at[lane] = as_bits(limited(x, I.mods.clamp));
  }
  return r;
}
static void mixed_half(Wave& w, const Ins& I, int shift) {
  Lanes r = mixed_fma(w, I);
  u32* d = w.v[I.args[0].index];
  FOR_LANES r.at[lane] = (d[lane] & ~(0xffffu << shift)) | float_to_half(as_float(r.at[lane]))
                                                               << shift;
  blend(w, d, r.at);
}
OP(v_fma_mix_f32, VALU | FLOAT_CLAMP, 1, taint_any) {
  Lanes r = mixed_fma(w, I);
  blend(w, w.v[I.args[0].index], r.at);
}
// The other half stays as undefined as it was.
template <int SHIFT>
static void taint_mixed_half(Wave& w, const Ins& I) {
  Lanes scratch, any = {}, r;
  for (int k = 1; k < I.nargs; k++) {
    const u32* t = source_undefined(w, I, k, 0, scratch);
    bool is_half = I.mods.op_sel_hi >> (k - 1) & 1;
    u32 read = !is_half ? ~0u : chosen(I, k, false) ? 0xffff0000u : 0xffffu;
    FOR_LANES any.at[lane] |= t[lane] & read;
  }
  const u32* before = w.undefined[I.args[0].index];
  FOR_LANES r.at[lane] =
      (before[lane] & ~(0xffffu << SHIFT)) | (spread(any.at[lane]) & 0xffffu << SHIFT);
  finish_undefined(w, I, r);
}
OP(v_fma_mixlo_f16, VALU | FLOAT_CLAMP | READS_DST, 1, taint_mixed_half<0>) {
  mixed_half(w, I, 0);
}
OP(v_fma_mixhi_f16, VALU | FLOAT_CLAMP | READS_DST, 1, taint_mixed_half<16>) {
  mixed_half(w, I, 16);
}

// ---- dot products with a 32-bit accumulator: argument 3, or the destination (v_dot*c)
template <class F>
static void dot(Wave& w, const Ins& I, F f) {
  Lanes s0, s1, s2, r;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  const u32* c = I.nargs > 3 ? source(w, I, 3, s2) : w.v[I.args[0].index];
  FOR_LANES r.at[lane] = f(a[lane], b[lane], c[lane]);
  finish(w, I, r);
}
static u32 dot2(u32 a, u32 b, u32 c, bool bf16) {
  auto part = [&](u32 x, int shift) {
    return bf16 ? bf16_to_float(x >> shift & 0xffff) : half_to_float(x >> shift & 0xffff);
  };
  return as_bits(fmaf(part(a, 16), part(b, 16), fmaf(part(a, 0), part(b, 0), as_float(c))));
}
template <bool SIGNED>
static u32 dot4(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; i++) {
    u32 x = a >> 8 * i & 255, y = b >> 8 * i & 255;
    c += SIGNED ? (u32)((i8)x * (i8)y) : x * y;
  }
  return c;
}
OP(v_dot2_f32_f16, VALU | DOT, 1, taint_any) {
  dot(w, I, [](u32 a, u32 b, u32 c) { return dot2(a, b, c, false); });
}
OP(v_dot2_f32_bf16, VALU | DOT, 1, taint_any) {
  dot(w, I, [](u32 a, u32 b, u32 c) { return dot2(a, b, c, true); });
}
OP(v_dot2c_f32_f16, VALU | DOT | READS_DST, 1, taint_any) {
  dot(w, I, [](u32 a, u32 b, u32 c) { return dot2(a, b, c, false); });
}
OP(v_dot2c_f32_bf16, VALU | DOT | READS_DST, 1, taint_any) {
  dot(w, I, [](u32 a, u32 b, u32 c) { return dot2(a, b, c, true); });
}
OP(v_dot4_i32_i8, VALU | DOT, 1, taint_any) { dot(w, I, dot4<true>); }
OP(v_dot4_u32_u8, VALU | DOT, 1, taint_any) { dot(w, I, dot4<false>); }
OP(v_dot4c_i32_i8, VALU | DOT | READS_DST, 1, taint_any) { dot(w, I, dot4<true>); }

}  // namespace cdnasim
