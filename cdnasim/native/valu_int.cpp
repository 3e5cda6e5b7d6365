// Vector integer and bit operations. The second expression of a _T form gives the undefined
// result bits; bit movements move them, AND and OR with a known bit hide them.
#include "operands.hpp"

namespace cdnasim {

static u32 and_undefined(u32 a, u32 b, u32 ta, u32 tb) { return (ta & (b | tb)) | (tb & a); }
static u32 or_undefined(u32 a, u32 b, u32 ta, u32 tb) { return (ta & (~b | tb)) | (tb & ~a); }

// ---- moves and logic
VALU1_T(v_mov_b32, a, ta)
VALU1_T(v_accvgpr_read_b32, a, ta)
VALU1_T(v_accvgpr_write_b32, a, ta)
VALU1_T(v_accvgpr_mov_b32, a, ta)
VALU1_T(v_not_b32, ~a, ta)
VALU1_T(v_bfrev_b32, reverse_bits(a), reverse_bits(ta))
VALU2_T(v_and_b32, a & b, and_undefined(a, b, ta, tb))
VALU2_T(v_or_b32, a | b, or_undefined(a, b, ta, tb))
VALU2_T(v_xor_b32, a ^ b, ta | tb)
VALU2_T(v_xnor_b32, ~(a ^ b), ta | tb)
VALU3_T(v_or3_b32, a | b | c, (or_undefined(a | b, c, or_undefined(a, b, ta, tb), tc)))
VALU3_T(v_and_or_b32, (a & b) | c, (or_undefined(a & b, c, and_undefined(a, b, ta, tb), tc)))
VALU3_T(v_bfi_b32, (a & b) | (~a & c), ta | (a & tb) | (~a & tc))
static void taint_mov_b64(Wave& w, const Ins& I) {
  Lanes64 t;
  source64_undefined(w, I, 1, t);
  finish64_undefined(w, I, t);
}
OP(v_mov_b64, VALU, 1, taint_mov_b64) {
  Lanes64 a;
  source64(w, I, 1, a);
  finish64(w, I, a);
}

// ---- shifts; an undefined shift amount spoils everything
VALU2_T(v_lshlrev_b32, b << (a & 31), tb << (a & 31) | spread(ta))
VALU2_T(v_lshrrev_b32, b >> (a & 31), tb >> (a & 31) | spread(ta))
VALU2_T(v_ashrrev_i32, (u32)((i32)b >> (a & 31)), (u32)((i32)tb >> (a & 31)) | spread(ta))
VALU3_T(v_lshl_or_b32, a << (b & 31) | c, ta << (b & 31) | tc | spread(tb))
VALU3_T(v_lshl_add_u32, (a << (b & 31)) + c, upward(ta << (b & 31) | tc) | spread(tb))
VALU3_T(v_add_lshl_u32, (a + b) << (c & 31), upward(ta | tb) << (c & 31) | spread(tc))
VALU3_T(v_alignbit_b32, (u32)(join(b, a) >> (c & 31)), (u32)(join(tb, ta) >> (c & 31)) | spread(tc))
VALU3_T(v_alignbyte_b32, (u32)(join(b, a) >> 8 * (c & 3)),
        (u32)(join(tb, ta) >> 8 * (c & 3)) | spread(tc))
static u32 low_mask(u32 bits) { return (1u << (bits & 31)) - 1; }
VALU3_T(v_bfe_u32, a >> (b & 31) & low_mask(c), (ta >> (b & 31) & low_mask(c)) | spread(tb | tc))
static u32 bfe_signed(u32 a, u32 b, u32 c) {
  return c & 31 ? (u32)sign_extend(a >> (b & 31), c & 31) : 0;
}
VALU3_T(v_bfe_i32, bfe_signed(a, b, c), bfe_signed(ta, b, c) | spread(tb | tc))
VALU2(v_bfm_b32, low_mask(a) << (b & 31))

// Each byte of the selector names a byte of {a, b}, a sign fill or a constant.
static u32 permute_bytes(u32 a, u32 b, u32 selector, bool undefined_plane) {
  u64 bytes = join(b, a);
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = selector >> 8 * i & 255, x;
    if (s >= 13) x = undefined_plane ? 0 : 255;
    else if (s == 12) x = 0;
    else if (s >= 8) x = bytes >> (16 * (s - 8) + 15) & 1 ? 255 : 0;
    else x = bytes >> 8 * s & 255;
    result |= x << 8 * i;
  }
  return result;
}
VALU3_T(v_perm_b32, permute_bytes(a, b, c, false), permute_bytes(ta, tb, c, true) | spread(tc))

static u32 truth_table(u32 table, u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
OP(v_bitop3_b32, VALU, 1, taint_any) {
  u32 table = I.mods.truth_table;
  map3(w, I, [=](u32 a, u32 b, u32 c) { return truth_table(table, a, b, c); });
}
OP(v_bitop3_b16, VALU | HALF_SOURCE | HALF_RESULT, 1, taint_any) {
  u32 table = I.mods.truth_table;
  map3(w, I, [=](u32 a, u32 b, u32 c) { return truth_table(table, a, b, c) & 0xffff; });
}

// ---- 64-bit
#define SHIFT64(name, e)                                                                  \
  static void taint_##name(Wave& w, const Ins& I) {                                       \
    Lanes s0, t0;                                                                         \
    Lanes64 value, r;                                                                     \
    const u32 *amount = source(w, I, 1, s0), *unknown = source_undefined(w, I, 1, 0, t0); \
    source64_undefined(w, I, 2, value);                                                   \
    FOR_LANES {                                                                           \
      u64 x = value.at[lane];                                                             \
      int n = amount[lane] & 63;                                                          \
      r.at[lane] = unknown[lane] ? ~0ull : (e);                                           \
    }                                                                                     \
    finish64_undefined(w, I, r);                                                          \
  }                                                                                       \
  OP(name, VALU, 1, taint_##name) {                                                       \
    Lanes s0;                                                                             \
    Lanes64 value, r;                                                                     \
    const u32* amount = source(w, I, 1, s0);                                              \
    source64(w, I, 2, value);                                                             \
    FOR_LANES {                                                                           \
      u64 x = value.at[lane];                                                             \
      int n = amount[lane] & 63;                                                          \
      r.at[lane] = (e);                                                                   \
    }                                                                                     \
    finish64(w, I, r);                                                                    \
  }
SHIFT64(v_lshlrev_b64, x << n)
SHIFT64(v_lshrrev_b64, x >> n)
SHIFT64(v_ashrrev_i64, (u64)((i64)x >> n))
static void taint_lshl_add_u64(Wave& w, const Ins& I) {
  Lanes s0, t0;
  Lanes64 a, c, r;
  source64_undefined(w, I, 1, a);
  const u32 *b = source(w, I, 2, s0), *tb = source_undefined(w, I, 2, 0, t0);
  source64_undefined(w, I, 3, c);
  FOR_LANES r.at[lane] = tb[lane] ? ~0ull : upward(a.at[lane] << (b[lane] & 7) | c.at[lane]);
  finish64_undefined(w, I, r);
}
OP(v_lshl_add_u64, VALU, 1, taint_lshl_add_u64) {
  Lanes s0;
  Lanes64 a, c, r;
  source64(w, I, 1, a);
  const u32* b = source(w, I, 2, s0);
  source64(w, I, 3, c);
  FOR_LANES r.at[lane] = (a.at[lane] << (b[lane] & 7)) + c.at[lane];
  finish64(w, I, r);
}
template <class F>
static void multiply_add64(Wave& w, const Ins& I, F multiply) {
  Lanes s0, s1;
  Lanes64 c, r;
  const u32 *a = source(w, I, 2, s0), *b = source(w, I, 3, s1);
  source64(w, I, 4, c);
  u64 carry = 0;
  FOR_LANES {
    u64 product = multiply(a[lane], b[lane]);
    r.at[lane] = product + c.at[lane];
    carry |= (u64)(r.at[lane] < product) << lane;
  }
  finish64(w, I, r);
  set_scalar64(w, I.args[1], carry & w.exec());
}
static void taint_multiply_add64(Wave& w, const Ins& I) {
  Lanes t0, t1;
  Lanes64 c, r;
  const u32 *a = source_undefined(w, I, 2, 0, t0), *b = source_undefined(w, I, 3, 0, t1);
  source64_undefined(w, I, 4, c);
  u64 carry = 0;
  FOR_LANES {
    r.at[lane] = a[lane] | b[lane] ? ~0ull : upward(c.at[lane]);
    carry |= (r.at[lane] >> 63) << lane;
  }
  finish64_undefined(w, I, r);
  set_scalar64_undefined(w, I, I.args[1].index, carry & w.exec());
}
OP(v_mad_u64_u32, VALU, 2, taint_multiply_add64) {
  multiply_add64(w, I, [](u32 a, u32 b) { return (u64)a * b; });
}
OP(v_mad_i64_i32, VALU, 2, taint_multiply_add64) {
  multiply_add64(w, I, [](u32 a, u32 b) { return (u64)((i64)(i32)a * (i32)b); });
}

// ---- 32-bit arithmetic. With the clamp modifier an overflow saturates.
static void taint_sum(Wave& w, const Ins& I) {
  if (I.mods.clamp) return taint_any(w, I);
  taint2(w, I, [](u32, u32, u32 ta, u32 tb) { return upward(ta | tb); });
}
static i64 limit(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }
#define SATURATING2(name, T, expression, low, high) \
  OP(name, VALU | INT_CLAMP, 1, taint_sum) {        \
    if (!I.mods.clamp)                              \
      map2(w, I, [](u32 ua, u32 ub) {               \
        i64 a = (T)ua, b = (T)ub;                   \
        return (u32)(expression);                   \
      });                                           \
    else                                            \
      map2(w, I, [](u32 ua, u32 ub) {               \
        i64 a = (T)ua, b = (T)ub;                   \
        return (u32)limit((expression), low, high); \
      });                                           \
  }
SATURATING2(v_add_u32, u32, a + b, 0, 0xffffffffll)
SATURATING2(v_sub_u32, u32, a - b, 0, 0xffffffffll)
SATURATING2(v_subrev_u32, u32, b - a, 0, 0xffffffffll)
SATURATING2(v_add_i32, i32, a + b, -0x80000000ll, 0x7fffffffll)
SATURATING2(v_sub_i32, i32, a - b, -0x80000000ll, 0x7fffffffll)
VALU3_T(v_add3_u32, a + b + c, upward(ta | tb | tc))
VALU3_T(v_xad_u32, (a ^ b) + c, upward(ta | tb | tc))
VALU2(v_mul_lo_u32, a * b)
VALU2(v_mul_hi_u32, (u32)((u64)a * b >> 32))
VALU2(v_mul_hi_i32, (u32)((u64)((i64)(i32)a*(i32)b) >> 32))
static u32 u24(u32 x) { return x & 0xffffff; }
static i32 i24(u32 x) { return sign_extend(x, 24); }
VALU2(v_mul_u32_u24, u24(a) * u24(b))
VALU2(v_mul_i32_i24, (u32)i24(a) * (u32)i24(b))
VALU2(v_mul_hi_u32_u24, (u32)((u64)u24(a) * u24(b) >> 32))
VALU2(v_mul_hi_i32_i24, (u32)((u64)((i64)i24(a) * i24(b)) >> 32))
VALU3(v_mad_u32_u24, u24(a) * u24(b) + c)
VALU3(v_mad_i32_i24, (u32)i24(a) * (u32)i24(b) + c)
VALU2(v_max_i32, (i32)a > (i32)b ? a : b)
VALU2(v_min_i32, (i32)a < (i32)b ? a : b)
VALU2(v_max_u32, a > b ? a : b)
VALU2(v_min_u32, a < b ? a : b)
static i32 max_i(i32 a, i32 b) { return a > b ? a : b; }
static i32 min_i(i32 a, i32 b) { return a < b ? a : b; }
static u32 max_u(u32 a, u32 b) { return a > b ? a : b; }
static u32 min_u(u32 a, u32 b) { return a < b ? a : b; }
VALU3(v_max3_i32, (u32)max_i(max_i(a, b), c))
VALU3(v_min3_i32, (u32)min_i(min_i(a, b), c))
VALU3(v_med3_i32, (u32)max_i(min_i(a, b), min_i(max_i(a, b), c)))
VALU3(v_max3_u32, max_u(max_u(a, b), c))
VALU3(v_min3_u32, min_u(min_u(a, b), c))
VALU3(v_med3_u32, max_u(min_u(a, b), min_u(max_u(a, b), c)))
VALU3(v_sad_u32, (a > b ? a - b : b - a) + c)
VALU2(v_bcnt_u32_b32, (u32)__builtin_popcount(a) + b)
VALU1(v_ffbh_u32, a ? (u32)__builtin_clz(a) : ~0u)
VALU1(v_ffbl_b32, a ? (u32)__builtin_ctz(a) : ~0u)
VALU1(v_ffbh_i32, (a ^ (u32)((i32)a >> 31)) ? (u32)__builtin_clz(a ^ (u32)((i32)a >> 31)) : ~0u)

// ---- carries: vdst, carry-out, a, b [, carry-in]
enum Carry { ADD, SUB, SUBREV };
template <Carry KIND>
static void with_carry(Wave& w, const Ins& I) {
  Lanes s0, s1, result;
  const u32 *x = source(w, I, 2, s0), *y = source(w, I, 3, s1);
  u64 in = I.nargs > 4 ? scalar64(w, I.args[4]) : 0, out = 0;
  FOR_LANES {
    u64 a = KIND == SUBREV ? y[lane] : x[lane], b = KIND == SUBREV ? x[lane] : y[lane];
    u64 carry = in >> lane & 1;
    result.at[lane] = (u32)(KIND == ADD ? a + b + carry : a - b - carry);
    out |= (u64)(KIND == ADD ? (a + b + carry) >> 32 & 1 : b + carry > a) << lane;
  }
  finish(w, I, result);
  set_scalar64(w, I.args[1], out & w.exec());
}
OP(v_add_co_u32, VALU, 2, taint_any) { with_carry<ADD>(w, I); }
OP(v_sub_co_u32, VALU, 2, taint_any) { with_carry<SUB>(w, I); }
OP(v_subrev_co_u32, VALU, 2, taint_any) { with_carry<SUBREV>(w, I); }
OP(v_addc_co_u32, VALU | LANE_MASK, 2, taint_any) { with_carry<ADD>(w, I); }
OP(v_subb_co_u32, VALU | LANE_MASK, 2, taint_any) { with_carry<SUB>(w, I); }
OP(v_subbrev_co_u32, VALU | LANE_MASK, 2, taint_any) { with_carry<SUBREV>(w, I); }

// ---- 16-bit: on gfx9 the two-source forms clear the upper half, v_mad_* keep it
#define HALF (HALF_SOURCE | HALF_RESULT)
#define SHORT2(name, e) VALU_F(2, name, HALF, (u32 a, u32 b), (e) & 0xffff)
#define SHORT3(name, e) VALU_F(3, name, HALF | KEEPS_HIGH, (u32 a, u32 b, u32 c), (e) & 0xffff)
#define SHORT_SATURATING(name, T, expression, low, high)      \
  OP(name, VALU | INT_CLAMP | HALF, 1, taint_any) {           \
    bool clamp = I.mods.clamp;                                \
    map2(w, I, [=](u32 ua, u32 ub) {                          \
      i64 a = (T)ua, b = (T)ub;                               \
      i64 r = (expression);                                   \
      return (u32)(clamp ? limit(r, low, high) : r) & 0xffff; \
    });                                                       \
  }
SHORT_SATURATING(v_add_u16, u16, a + b, 0, 0xffff)
SHORT_SATURATING(v_sub_u16, u16, a - b, 0, 0xffff)
SHORT_SATURATING(v_subrev_u16, u16, b - a, 0, 0xffff)
SHORT_SATURATING(v_add_i16, i16, a + b, -0x8000, 0x7fff)
SHORT_SATURATING(v_sub_i16, i16, a - b, -0x8000, 0x7fff)
SHORT2(v_mul_lo_u16, a * b)
SHORT2(v_lshlrev_b16, b << (a & 15))
SHORT2(v_lshrrev_b16, (b & 0xffff) >> (a & 15))
SHORT2(v_ashrrev_i16, (u32)((i16)b >> (a & 15)))
SHORT2(v_max_u16, max_u(a & 0xffff, b & 0xffff))
SHORT2(v_min_u16, min_u(a & 0xffff, b & 0xffff))
SHORT2(v_max_i16, (u32)max_i((i16)a, (i16)b))
SHORT2(v_min_i16, (u32)min_i((i16)a, (i16)b))
SHORT3(v_mad_u16, a * b + c)
SHORT3(v_mad_i16, a * b + c)
SHORT3(v_mad_legacy_u16, a * b + c)
VALU_F(3, v_mad_u32_u16, HALF_SOURCE, (u32 a, u32 b, u32 c), (a & 0xffff) * (b & 0xffff) + c)
VALU_F(3, v_mad_i32_i16, HALF_SOURCE, (u32 a, u32 b, u32 c), (u32)((i16)a*(i16)b) + c)
VALU_TF(2, v_pack_b32_f16, HALF_SOURCE, (u32 a, u32 b), (U a, U b, U ta, U tb),
        (a & 0xffff) | b << 16, (ta & 0xffff) | tb << 16)

}  // namespace cdnasim
