// Scalar ALU. Semantics: AMD Instinct MI300 ISA, chapter 12 (SOP1, SOP2, SOPC, SOPK).
#include "operands.hpp"

namespace cdnasim {

// Sources are a, b (32 bits) or as 64-bit words in the SALU64 forms; r is the result.
#define SALU_OP(name, flags, setup, expression, store, carry) \
  OP(name, SALU | (flags), 1, taint_scalar) {                 \
    setup;                                                    \
    auto r = (expression);                                    \
    carry;                                                    \
    store(w, I.args[0], r);                                   \
  }
#define A32 [[maybe_unused]] u32 a = scalar(w, I.args[1])
#define AB32 \
  A32;       \
  [[maybe_unused]] u32 b = scalar(w, I.args[2])
#define A64 [[maybe_unused]] u64 a = scalar64(w, I.args[1])
#define AB64 \
  A64;       \
  [[maybe_unused]] u64 b = scalar64(w, I.args[2])
#define NONZERO w.s[SCC] = r != 0
#define LOGIC1(name, e) SALU_OP(name, WRITES_SCC, A32, (u32)(e), set_scalar, NONZERO)
#define LOGIC2(name, e) SALU_OP(name, WRITES_SCC, AB32, (u32)(e), set_scalar, NONZERO)
#define PLAIN1(name, e) SALU_OP(name, 0, A32, (u32)(e), set_scalar, )
#define PLAIN2(name, e) SALU_OP(name, 0, AB32, (u32)(e), set_scalar, )
#define LOGIC64_1(name, e) SALU_OP(name, WRITES_SCC, A64, (u64)(e), set_scalar64, NONZERO)
#define LOGIC64_2(name, e) SALU_OP(name, WRITES_SCC, AB64, (u64)(e), set_scalar64, NONZERO)
#define SHIFT64(name, e) \
  SALU_OP(name, WRITES_SCC, A64; u32 b = scalar(w, I.args[2]), (u64)(e), set_scalar64, NONZERO)

static int first_one(u64 x) { return x ? __builtin_ctzll(x) : -1; }
static u32 field(u32 bits) { return bits >= 32 ? ~0u : (1u << bits) - 1; }
static u64 field64(u32 bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

// ---- moves
static void taint_move(Wave& w, const Ins& I) {
  const Arg& a = I.args[1];
  for (int d = 0; d < I.args[0].count; d++)
    set_scalar_undefined(w, I, I.args[0].index + d,
                         a.kind == ARG_SGPR ? w.s_undefined[a.index + d] : 0);
}
OP(s_mov_b32, SALU, 1, taint_move) { set_scalar(w, I.args[0], scalar(w, I.args[1])); }
OP(s_mov_b64, SALU, 1, taint_move) { set_scalar64(w, I.args[0], scalar64(w, I.args[1])); }
PLAIN1(s_movk_i32, (i32)(i16)a)
OP(s_cmov_b32, SALU | READS_SCC | READS_DST, 1, taint_scalar) {
  if (w.s[SCC]) set_scalar(w, I.args[0], scalar(w, I.args[1]));
}
OP(s_cmov_b64, SALU | READS_SCC | READS_DST, 1, taint_scalar) {
  if (w.s[SCC]) set_scalar64(w, I.args[0], scalar64(w, I.args[1]));
}
static void taint_select(Wave& w, const Ins& I) {
  const Arg& a = I.args[w.s[SCC] ? 1 : 2];
  u32 condition = spread(w.s_undefined[SCC]);
  for (int d = 0; d < I.args[0].count; d++)
    set_scalar_undefined(w, I, I.args[0].index + d,
                         condition | (a.kind == ARG_SGPR ? w.s_undefined[a.index + d] : 0));
}
OP(s_cselect_b32, SALU | READS_SCC, 1, taint_select) {
  set_scalar(w, I.args[0], scalar(w, I.args[w.s[SCC] ? 1 : 2]));
}
OP(s_cselect_b64, SALU | READS_SCC, 1, taint_select) {
  set_scalar64(w, I.args[0], scalar64(w, I.args[w.s[SCC] ? 1 : 2]));
}
// encode.py resolves symbol@rel32 operands against this same base.
OP(s_getpc_b64, SALU, 1, taint_scalar) { set_scalar64(w, I.args[0], w.group->launch->code_base); }

// ---- 32-bit arithmetic
OP(s_add_u32, SALU | WRITES_SCC, 1, taint_scalar) {
  AB32;
  u64 r = (u64)a + b;
  w.s[SCC] = r >> 32;
  set_scalar(w, I.args[0], (u32)r);
}
OP(s_addc_u32, SALU | WRITES_SCC | READS_SCC, 1, taint_scalar) {
  AB32;
  u64 r = (u64)a + b + w.s[SCC];
  w.s[SCC] = r >> 32;
  set_scalar(w, I.args[0], (u32)r);
}
OP(s_sub_u32, SALU | WRITES_SCC, 1, taint_scalar) {
  AB32;
  w.s[SCC] = b > a;
  set_scalar(w, I.args[0], a - b);
}
OP(s_subb_u32, SALU | WRITES_SCC | READS_SCC, 1, taint_scalar) {
  AB32;
  u64 subtrahend = (u64)b + w.s[SCC];
  w.s[SCC] = subtrahend > a;
  set_scalar(w, I.args[0], a - (u32)subtrahend);
}
#define OVERFLOWING(name, op)                    \
  OP(name, SALU | WRITES_SCC, 1, taint_scalar) { \
    AB32;                                        \
    i64 r = (i64)(i32)a op(i32) b;               \
    w.s[SCC] = r != (i32)r;                      \
    set_scalar(w, I.args[0], (u32)r);            \
  }
OVERFLOWING(s_add_i32, +)
OVERFLOWING(s_sub_i32, -)
OP(s_addk_i32, SALU | WRITES_SCC | READS_DST, 1, taint_scalar) {
  i64 r = (i64)(i32)w.s[I.args[0].index] + (i16)I.args[1].value;
  w.s[SCC] = r != (i32)r;
  set_scalar(w, I.args[0], (u32)r);
}
OP(s_mulk_i32, SALU | READS_DST, 1, taint_scalar) {
  w.s[I.args[0].index] *= (u32)(i32)(i16)I.args[1].value;
}
PLAIN2(s_mul_i32, a * b)
PLAIN2(s_mul_hi_u32, (u64)a * b >> 32)
PLAIN2(s_mul_hi_i32, (u64)((i64)(i32)a*(i32)b) >> 32)
LOGIC1(s_abs_i32, (i32)a < 0 ? 0 - a : a)
LOGIC2(s_absdiff_i32, (i64)(i32)a > (i32)b ? a - b : b - a)
#define MINMAX(name, T, op)                      \
  OP(name, SALU | WRITES_SCC, 1, taint_scalar) { \
    AB32;                                        \
    w.s[SCC] = (T)a op(T) b;                     \
    set_scalar(w, I.args[0], w.s[SCC] ? a : b);  \
  }
MINMAX(s_max_i32, i32, >)
MINMAX(s_min_i32, i32, <)
MINMAX(s_max_u32, u32, >)
MINMAX(s_min_u32, u32, <)
#define SHIFT_ADD(n)                                            \
  OP(s_lshl##n##_add_u32, SALU | WRITES_SCC, 1, taint_scalar) { \
    AB32;                                                       \
    u64 r = ((u64)a << n) + b;                                  \
    w.s[SCC] = r >> 32 != 0;                                    \
    set_scalar(w, I.args[0], (u32)r);                           \
  }
SHIFT_ADD(1)
SHIFT_ADD(2) SHIFT_ADD(3) SHIFT_ADD(4)

    // ---- logic. AND and OR with a known bit hide an undefined one.
    template <bool IS_OR, bool INVERT_B>
    static void taint_logic(Wave& w, const Ins& I) {
  const Arg &a = I.args[1], &b = I.args[2];
  u32 any = 0, results[2] = {};
  for (int d = 0; d < I.args[0].count; d++) {
    u32 x = a.kind == ARG_SGPR ? w.s[a.index + d] : (u32)(d ? a.high : a.value);
    u32 y = b.kind == ARG_SGPR ? w.s[b.index + d] : (u32)(d ? b.high : b.value);
    u32 tx = a.kind == ARG_SGPR ? w.s_undefined[a.index + d] : 0;
    u32 ty = b.kind == ARG_SGPR ? w.s_undefined[b.index + d] : 0;
    if (INVERT_B) y = ~y;
    results[d] = IS_OR ? (tx & (~y | ty)) | (ty & ~x) : (tx & (y | ty)) | (ty & x);
    any |= results[d];
  }
  for (int d = 0; d < I.args[0].count; d++)
    set_scalar_undefined(w, I, I.args[0].index + d, results[d]);
  set_scalar_undefined(w, I, SCC, spread(any));
}
#define LOGIC_TAINTED(name, bits, setup, e, taint) \
  OP(name, SALU | WRITES_SCC, 1, (taint)) {        \
    setup;                                         \
    u##bits r = (e);                               \
    NONZERO;                                       \
    LOGIC_STORE_##bits(w, I.args[0], r);           \
  }
#define LOGIC_STORE_32 set_scalar
#define LOGIC_STORE_64 set_scalar64
LOGIC_TAINTED(s_and_b32, 32, AB32, a & b, (taint_logic<false, false>))
LOGIC_TAINTED(s_or_b32, 32, AB32, a | b, (taint_logic<true, false>))
LOGIC_TAINTED(s_andn2_b32, 32, AB32, a & ~b, (taint_logic<false, true>))
LOGIC_TAINTED(s_orn2_b32, 32, AB32, a | ~b, (taint_logic<true, true>))
LOGIC_TAINTED(s_and_b64, 64, AB64, a & b, (taint_logic<false, false>))
LOGIC_TAINTED(s_or_b64, 64, AB64, a | b, (taint_logic<true, false>))
LOGIC_TAINTED(s_andn2_b64, 64, AB64, a & ~b, (taint_logic<false, true>))
LOGIC_TAINTED(s_orn2_b64, 64, AB64, a | ~b, (taint_logic<true, true>))
LOGIC1(s_not_b32, ~a)
LOGIC64_1(s_not_b64, ~a)
LOGIC2(s_xor_b32, a ^ b)
LOGIC2(s_nand_b32, ~(a & b))
LOGIC2(s_nor_b32, ~(a | b))
LOGIC2(s_xnor_b32, ~(a ^ b))
LOGIC64_2(s_xor_b64, a ^ b)
LOGIC64_2(s_nand_b64, ~(a & b))
LOGIC64_2(s_nor_b64, ~(a | b))
LOGIC64_2(s_xnor_b64, ~(a ^ b))

// ---- shifts and bit fields
LOGIC2(s_lshl_b32, a << (b & 31))
LOGIC2(s_lshr_b32, a >> (b & 31))
LOGIC2(s_ashr_i32, (i32)a >> (b & 31))
SHIFT64(s_lshl_b64, a << (b & 63))
SHIFT64(s_lshr_b64, a >> (b & 63))
SHIFT64(s_ashr_i64, (i64)a >> (b & 63))
LOGIC2(s_bfe_u32, a >> (b & 31) & field(b >> 16 & 127))
static u32 extract_signed(u32 a, u32 b) {
  u32 bits = b >> 16 & 127, low = a >> (b & 31);
  return bits == 0 ? 0 : bits >= 32 ? (u32)((i32)a >> (b & 31)) : (u32)sign_extend(low, bits);
}
LOGIC2(s_bfe_i32, extract_signed(a, b))
SHIFT64(s_bfe_u64, a >> (b & 63) & field64(b >> 16 & 127))
PLAIN2(s_bfm_b32, field(a & 31) << (b & 31))
OP(s_bfm_b64, SALU, 1, taint_scalar) {
  AB32;
  set_scalar64(w, I.args[0], field64(a & 63) << (b & 63));
}
PLAIN1(s_brev_b32, reverse_bits(a))
PLAIN1(s_sext_i32_i8, (i32)(i8)a)
PLAIN1(s_sext_i32_i16, (i32)(i16)a)
PLAIN2(s_pack_ll_b32_b16, (a & 0xffff) | b << 16)
PLAIN2(s_pack_lh_b32_b16, (a & 0xffff) | (b & 0xffff0000))
PLAIN2(s_pack_hh_b32_b16, a >> 16 | (b & 0xffff0000))
OP(s_bitset0_b32, SALU | READS_DST, 1, taint_scalar) {
  w.s[I.args[0].index] &= ~(1u << (scalar(w, I.args[1]) & 31));
}
OP(s_bitset1_b32, SALU | READS_DST, 1, taint_scalar) {
  w.s[I.args[0].index] |= 1u << (scalar(w, I.args[1]) & 31);
}
LOGIC1(s_bcnt1_i32_b32, __builtin_popcount(a))
LOGIC1(s_bcnt0_i32_b32, 32 - __builtin_popcount(a))
OP(s_bcnt1_i32_b64, SALU | WRITES_SCC, 1, taint_scalar) {
  A64;
  u32 r = __builtin_popcountll(a);
  NONZERO;
  set_scalar(w, I.args[0], r);
}
PLAIN1(s_ff1_i32_b32, first_one(a))
PLAIN1(s_ff0_i32_b32, first_one((u32)~a))
PLAIN1(s_flbit_i32_b32, a ? __builtin_clz(a) : -1)
OP(s_ff1_i32_b64, SALU, 1, taint_scalar) {
  A64;
  set_scalar(w, I.args[0], first_one(a));
}
OP(s_ff0_i32_b64, SALU, 1, taint_scalar) {
  A64;
  set_scalar(w, I.args[0], first_one(~a));
}
OP(s_flbit_i32_b64, SALU, 1, taint_scalar) {
  A64;
  set_scalar(w, I.args[0], a ? __builtin_clzll(a) : -1);
}

// ---- EXEC
#define SAVEEXEC(name, expression)                                          \
  static void taint_##name(Wave& w, const Ins& I) {                         \
    u64 undefined = scalar64_undefined(w, I.args[1]);                       \
    set_scalar64_undefined(w, I, I.args[0].index, 0);                       \
    set_scalar64_undefined(w, I, EXEC, undefined);                          \
    set_scalar_undefined(w, I, SCC, undefined != 0);                        \
  }                                                                         \
  OP(name, SALU | WRITES_SCC | READS_EXEC | WRITES_EXEC, 1, taint_##name) { \
    u64 a = scalar64(w, I.args[1]), exec = w.exec(), r = (expression);      \
    set_scalar64(w, I.args[0], exec);                                       \
    w.exec() = r;                                                           \
    NONZERO;                                                                \
  }
SAVEEXEC(s_and_saveexec_b64, a& exec)
SAVEEXEC(s_or_saveexec_b64, a | exec)
SAVEEXEC(s_xor_saveexec_b64, a ^ exec)
SAVEEXEC(s_andn2_saveexec_b64, a & ~exec)
SAVEEXEC(s_orn2_saveexec_b64, a | ~exec)

// ---- compares: destination is SCC alone
#define COMPARE(name, T, op)                                       \
  OP(name, SALU | WRITES_SCC, 0, taint_scalar) {                   \
    w.s[SCC] = (T)scalar(w, I.args[0]) op(T) scalar(w, I.args[1]); \
  }
#define COMPARES(suffix, T)                                              \
  COMPARE(s_cmp_eq_##suffix, T, ==)                                      \
  COMPARE(s_cmp_lg_##suffix, T, !=) COMPARE(s_cmp_gt_##suffix, T, >)     \
      COMPARE(s_cmp_ge_##suffix, T, >=) COMPARE(s_cmp_lt_##suffix, T, <) \
          COMPARE(s_cmp_le_##suffix, T, <=)
COMPARES(i32, i32)
COMPARES(u32, u32)
// SOPK carries a 16-bit immediate: signed for i32, zero-extended for u32.
#define COMPAREK(name, T, I16, op)                                 \
  OP(name, SALU | WRITES_SCC, 0, taint_scalar) {                   \
    w.s[SCC] = (T)scalar(w, I.args[0]) op(T)(I16) I.args[1].value; \
  }
#define COMPARESK(suffix, T, I16)                                                      \
  COMPAREK(s_cmpk_eq_##suffix, T, I16, ==)                                             \
  COMPAREK(s_cmpk_lg_##suffix, T, I16, !=) COMPAREK(s_cmpk_gt_##suffix, T, I16, >)     \
      COMPAREK(s_cmpk_ge_##suffix, T, I16, >=) COMPAREK(s_cmpk_lt_##suffix, T, I16, <) \
          COMPAREK(s_cmpk_le_##suffix, T, I16, <=)
COMPARESK(i32, i32, i16)
COMPARESK(u32, u32, u16)
OP(s_cmp_eq_u64, SALU | WRITES_SCC, 0, taint_scalar) {
  w.s[SCC] = scalar64(w, I.args[0]) == scalar64(w, I.args[1]);
}
OP(s_cmp_lg_u64, SALU | WRITES_SCC, 0, taint_scalar) {
  w.s[SCC] = scalar64(w, I.args[0]) != scalar64(w, I.args[1]);
}
#define BITCMP(name, source, expected)                                                             \
  OP(name, SALU | WRITES_SCC, 0, taint_scalar) {                                                   \
    w.s[SCC] =                                                                                     \
        (source(w, I.args[0]) >> (scalar(w, I.args[1]) & (sizeof(source(w, I.args[0])) * 8 - 1)) & \
         1) == expected;                                                                           \
  }
BITCMP(s_bitcmp0_b32, scalar, 0)
BITCMP(s_bitcmp1_b32, scalar, 1)
BITCMP(s_bitcmp0_b64, scalar64, 0)
BITCMP(s_bitcmp1_b64, scalar64, 1)

// ---- mode register. Argument 0 is the register (1: MODE, others read as zero), offset and
// offset1 the first bit and the width.
static u32 mode_field(const Ins& I) { return field(I.mods.offset1) << I.mods.offset; }
OP(s_setreg_imm32_b32, SALU | WRITES_MODE, 0, nullptr) {
  if (I.args[0].value != 1) return;
  w.mode = (w.mode & ~mode_field(I)) | ((u32)I.args[1].value << I.mods.offset & mode_field(I));
}
OP(s_setreg_b32, SALU | WRITES_MODE, 0, taint_scalar) {
  if (I.args[0].value != 1) return;
  w.mode = (w.mode & ~mode_field(I)) | (scalar(w, I.args[1]) << I.mods.offset & mode_field(I));
}
OP(s_getreg_b32, SALU | READS_MODE, 1, taint_scalar) {
  u32 value = I.args[1].value == 1 ? w.mode : 0;
  set_scalar(w, I.args[0], (value & mode_field(I)) >> I.mods.offset);
}

}  // namespace cdnasim
