// Vector compares: one result bit per active lane, inactive lanes give zero. v_cmpx also sets EXEC.
#include "operands.hpp"

namespace cdnasim {

// Undefined lanes of the sources make undefined result bits.
static u64 compare_undefined(Wave& w, const Ins& I, int words) {
  u64 mask = 0;
  for (int k = 1; k <= 2; k++)
    for (int d = 0; d < words; d++) {
      Lanes scratch;
      const u32* t = source_undefined(w, I, k, d, scratch);
      FOR_LANES mask |= (u64)(t[lane] != 0) << lane;
    }
  return mask & w.exec();
}
template <int WORDS>
static void taint_compare(Wave& w, const Ins& I) {
  u64 mask = compare_undefined(w, I, WORDS);
  set_scalar64_undefined(w, I, I.args[0].index, mask);
  if (I.flags & WRITES_EXEC) set_scalar64_undefined(w, I, EXEC, mask);
}

static void store_mask(Wave& w, const Ins& I, const u8* bits) {
  u64 mask = 0;
  FOR_LANES mask |= (u64)bits[lane] << lane;
  mask &= w.exec();
  set_scalar64(w, I.args[0], mask);
  if (I.flags & WRITES_EXEC) w.exec() = mask;
}

template <class T, class F>
static void compare32(Wave& w, const Ins& I, T convert, F f) {
  Lanes s0, s1;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  alignas(64) u8 bits[LANES];
  FOR_LANES bits[lane] = f(convert(a[lane]), convert(b[lane]));
  store_mask(w, I, bits);
}
template <class T, class F>
static void compare64(Wave& w, const Ins& I, T convert, F f) {
  Lanes64 a, b;
  source64(w, I, 1, a);
  source64(w, I, 2, b);
  u8 bits[LANES];
  FOR_LANES bits[lane] = f(convert(a.at[lane]), convert(b.at[lane]));
  store_mask(w, I, bits);
}

#define COMPARE(bits, words, predicate, suffix, flags, convert, test)                             \
  OP(v_cmp_##predicate##_##suffix, VALU | SCALAR_DST | (flags), 1, taint_compare<words>) {        \
    compare##bits(                                                                                \
        w, I, [](u##bits x) { return convert(x); }, [](auto a, auto b) -> bool { return test; }); \
  }                                                                                               \
  static int registered_v_cmpx_##predicate##_##suffix =                                           \
      add_op({"v_cmpx_" #predicate "_" #suffix,                                                   \
              VALU | SCALAR_DST | WRITES_EXEC | (flags),                                          \
              run_v_cmp_##predicate##_##suffix,                                                   \
              taint_compare<words>,                                                               \
              1,                                                                                  \
              {},                                                                                 \
              0});
#define ORDERED(bits, words, suffix, flags, convert)       \
  COMPARE(bits, words, lt, suffix, flags, convert, a < b)  \
  COMPARE(bits, words, eq, suffix, flags, convert, a == b) \
  COMPARE(bits, words, le, suffix, flags, convert, a <= b) \
  COMPARE(bits, words, gt, suffix, flags, convert, a > b)  \
  COMPARE(bits, words, ge, suffix, flags, convert, a >= b)
#define INTEGER(bits, words, suffix, flags, convert) \
  ORDERED(bits, words, suffix, flags, convert)       \
  COMPARE(bits, words, ne, suffix, flags, convert, a != b)
// lg: less or greater; n*: not; o, u: ordered, unordered. They differ on NaN.
#define FLOATING(bits, words, suffix, flags, convert)                  \
  ORDERED(bits, words, suffix, flags, convert)                         \
  COMPARE(bits, words, lg, suffix, flags, convert, a<b || a> b)        \
  COMPARE(bits, words, neq, suffix, flags, convert, !(a == b))         \
  COMPARE(bits, words, nlg, suffix, flags, convert, !(a < b || a > b)) \
  COMPARE(bits, words, nlt, suffix, flags, convert, !(a < b))          \
  COMPARE(bits, words, nle, suffix, flags, convert, !(a <= b))         \
  COMPARE(bits, words, ngt, suffix, flags, convert, !(a > b))          \
  COMPARE(bits, words, nge, suffix, flags, convert, !(a >= b))         \
  COMPARE(bits, words, o, suffix, flags, convert, a == a && b == b)    \
  COMPARE(bits, words, u, suffix, flags, convert, a != a || b != b)

static float half_value(u32 x) { return half_to_float(x & 0xffff); }
INTEGER(32, 1, u32, 0, (u32))
INTEGER(32, 1, i32, 0, (i32))
INTEGER(32, 1, u16, HALF_SOURCE, (u16))
INTEGER(32, 1, i16, HALF_SOURCE, (i16))
INTEGER(64, 2, u64, 0, (u64))
INTEGER(64, 2, i64, 0, (i64))
FLOATING(32, 1, f32, 0, as_float)
FLOATING(32, 1, f16, HALF_SIGN | HALF_SOURCE, half_value)
FLOATING(64, 2, f64, WIDE64, as_double)

// Bits of the class mask: sNaN, qNaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf.
static u32 float_class(u32 bits) {
  u32 magnitude = bits & 0x7fffffff;
  bool negative = bits >> 31;
  if (magnitude > 0x7f800000) return magnitude & 0x400000 ? 2 : 1;
  int kind = magnitude == 0x7f800000 ? 0 : magnitude >= 0x00800000 ? 1 : magnitude ? 2 : 3;
  return 1u << (negative ? 2 + kind : 9 - kind);
}
OP(v_cmp_class_f32, VALU | SCALAR_DST, 1, taint_compare<1>) {
  Lanes s0, s1;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  u8 bits[LANES];
  FOR_LANES bits[lane] = (float_class(a[lane]) & b[lane]) != 0;
  store_mask(w, I, bits);
}

}  // namespace cdnasim
