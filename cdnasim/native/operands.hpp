// Reading sources and writing results of vector instructions, with DPP, SDWA, op_sel, neg, abs,
// omod and clamp. Each function has a twin on the plane of undefined bits.
#pragma once
#include "findings.hpp"
#include "numeric.hpp"
#include "registry.hpp"

namespace cdnasim {

struct alignas(64) Lanes {
  u32 at[LANES];
};

// ---- SDWA byte and word selection
enum { WORD_0 = 4, WORD_1 = 5, DWORD = 6 };
inline u32 select_part(u32 x, int part, bool sign) {
  if (part == DWORD) return x;
  int bits = part < WORD_0 ? 8 : 16, shift = part < WORD_0 ? 8 * part : 16 * (part - WORD_0);
  u32 field = x >> shift & ((1u << bits) - 1);
  return sign ? (u32)sign_extend(field, bits) : field;
}

inline u32 sign_mask(const Ins& I) { return I.flags & HALF_SIGN ? 0x8000 : 0x80000000; }

const u32* source_slow(Wave& w, const Ins& I, int k, int dword, Lanes& scratch);
const u32* source_undefined(Wave& w, const Ins& I, int k, int dword, Lanes& scratch);

// The 64 lane values of argument k; `dword` picks a register of a wide operand.
inline const u32* source(Wave& w, const Ins& I, int k, Lanes& scratch, int dword = 0) {
  const Arg& a = I.args[k];
  return a.plain ? w.v[a.index + dword] : source_slow(w, I, k, dword, scratch);
}

inline void blend(Wave& w, u32* to, const u32* from) {
  if (w.exec() == ~0ull) {
    memcpy(to, from, 4 * LANES);
    return;
  }
  refresh_exec_lanes(w);
  FOR_LANES to[lane] = (from[lane] & w.exec_lanes[lane]) | (to[lane] & ~w.exec_lanes[lane]);
}

u64 written_lanes(Wave& w, const Ins& I);
void finish_slow(Wave& w, const Ins& I, Lanes& result, int dword);
void finish_undefined(Wave& w, const Ins& I, const Lanes& undefined, int dword = 0);

// Write a result to destination 0 (plus `dword`) under EXEC.
inline void finish(Wave& w, const Ins& I, Lanes& result, int dword = 0) {
  if (I.special_result) finish_slow(w, I, result, dword);
  else blend(w, w.v[I.args[0].index + dword], result.at);
}

// ---- scalar operands
inline u32 scalar(Wave& w, const Arg& a) {
  if (a.kind == ARG_SGPR) return w.s[a.index];
  if (a.kind == ARG_VGPR) return w.v[a.index][first_active(w)];
  return (u32)a.value;
}
inline u64 scalar64(Wave& w, const Arg& a) {
  return a.kind == ARG_SGPR ? w.pair(a.index) : join((u32)a.value, (u32)a.high);
}
inline void set_scalar(Wave& w, const Arg& a, u32 value) { w.s[a.index] = value; }
inline void set_scalar64(Wave& w, const Arg& a, u64 value) { w.set_pair(a.index, value); }
inline u64 scalar64_undefined(Wave& w, const Arg& a) {
  return a.kind == ARG_SGPR ? join(w.s_undefined[a.index], w.s_undefined[a.index + 1]) : 0;
}
void set_scalar_undefined(Wave& w, const Ins& I, int sgpr, u32 undefined);
void set_scalar64_undefined(Wave& w, const Ins& I, int sgpr, u64 undefined);

// ---- lane maps: apply a function of the source words in every lane
template <int FIRST = 1, class F>
inline void map1(Wave& w, const Ins& I, F f) {
  Lanes s0, result;
  const u32* a = source(w, I, FIRST, s0);
  FOR_LANES result.at[lane] = f(a[lane]);
  finish(w, I, result);
}
template <int FIRST = 1, class F>
inline void map2(Wave& w, const Ins& I, F f) {
  Lanes s0, s1, result;
  const u32 *a = source(w, I, FIRST, s0), *b = source(w, I, FIRST + 1, s1);
  FOR_LANES result.at[lane] = f(a[lane], b[lane]);
  finish(w, I, result);
}
template <int FIRST = 1, class F>
inline void map3(Wave& w, const Ins& I, F f) {
  Lanes s0, s1, s2, result;
  const u32 *a = source(w, I, FIRST, s0), *b = source(w, I, FIRST + 1, s1),
            *c = source(w, I, FIRST + 2, s2);
  FOR_LANES result.at[lane] = f(a[lane], b[lane], c[lane]);
  finish(w, I, result);
}
// The same on the plane of undefined bits; f sees values and undefined bits of each source.
template <class F>
inline void taint1(Wave& w, const Ins& I, F f) {
  Lanes s0, t0, result;
  const u32 *a = source(w, I, 1, s0), *ta = source_undefined(w, I, 1, 0, t0);
  FOR_LANES result.at[lane] = f(a[lane], ta[lane]);
  finish_undefined(w, I, result);
}
template <class F>
inline void taint2(Wave& w, const Ins& I, F f) {
  Lanes s0, s1, t0, t1, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  const u32 *ta = source_undefined(w, I, 1, 0, t0), *tb = source_undefined(w, I, 2, 0, t1);
  FOR_LANES result.at[lane] = f(a[lane], b[lane], ta[lane], tb[lane]);
  finish_undefined(w, I, result);
}
template <class F>
inline void taint3(Wave& w, const Ins& I, F f) {
  Lanes s0, s1, s2, t0, t1, t2, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1), *c = source(w, I, 3, s2);
  const u32 *ta = source_undefined(w, I, 1, 0, t0), *tb = source_undefined(w, I, 2, 0, t1),
            *tc = source_undefined(w, I, 3, 0, t2);
  FOR_LANES result.at[lane] = f(a[lane], b[lane], c[lane], ta[lane], tb[lane], tc[lane]);
  finish_undefined(w, I, result);
}
inline u32 spread(u32 undefined) { return undefined ? ~0u : 0; }
// Sums and products: an undefined bit can change itself and every bit above it.
template <class T>
inline T upward(T undefined) {
  return undefined | (T)(0 - undefined);
}

// ---- 64-bit operands
struct alignas(64) Lanes64 {
  u64 at[LANES];
};
inline void source64(Wave& w, const Ins& I, int k, Lanes64& out) {
  Lanes s0, s1;
  const u32 *low = source(w, I, k, s0), *high = source(w, I, k, s1, 1);
  FOR_LANES out.at[lane] = join(low[lane], high[lane]);
}
inline void source64_undefined(Wave& w, const Ins& I, int k, Lanes64& out) {
  Lanes s0, s1;
  const u32 *low = source_undefined(w, I, k, 0, s0), *high = source_undefined(w, I, k, 1, s1);
  FOR_LANES out.at[lane] = join(low[lane], high[lane]);
}
inline void finish64_undefined(Wave& w, const Ins& I, const Lanes64& value) {
  Lanes low, high;
  FOR_LANES low.at[lane] = (u32)value.at[lane], high.at[lane] = (u32)(value.at[lane] >> 32);
  finish_undefined(w, I, low);
  finish_undefined(w, I, high, 1);
}
inline void finish64(Wave& w, const Ins& I, const Lanes64& value) {
  Lanes low, high;
  FOR_LANES low.at[lane] = (u32)value.at[lane], high.at[lane] = (u32)(value.at[lane] >> 32);
  finish(w, I, low);
  finish(w, I, high, 1);
}

// VALU1(name, expression of a), VALU2(.. a, b), VALU3(.. a, b, c): unsigned 32-bit words.
// The _T forms add an expression for the undefined bits, of a, b, c and ta, tb, tc.
#define VALU_F(arity, name, flags, params, expression)           \
  static void run_##name(Wave& w, const Ins& I) {                \
    map##arity(w, I, [] params -> u32 { return (expression); }); \
  }                                                              \
  static int registered_##name = add_op({#name, VALU | (flags), run_##name, taint_any, 1, {}, 0});
#define VALU_TF(arity, name, flags, params, tparams, expression, undefined) \
  static void run_##name(Wave& w, const Ins& I) {                           \
    map##arity(w, I, [] params -> u32 { return (expression); });            \
  }                                                                         \
  static void taint_##name(Wave& w, const Ins& I) {                         \
    taint##arity(w, I, [] tparams -> u32 { return (undefined); });          \
  }                                                                         \
  static int registered_##name =                                            \
      add_op({#name, VALU | (flags), run_##name, taint_##name, 1, {}, 0});
#define U [[maybe_unused]] u32
#define VALU1(name, e) VALU_F(1, name, 0, (u32 a), e)
#define VALU2(name, e) VALU_F(2, name, 0, (u32 a, u32 b), e)
#define VALU3(name, e) VALU_F(3, name, 0, (u32 a, u32 b, u32 c), e)
#define VALU1_T(name, e, t) VALU_TF(1, name, 0, (u32 a), (U a, U ta), e, t)
#define VALU2_T(name, e, t) VALU_TF(2, name, 0, (u32 a, u32 b), (U a, U b, U ta, U tb), e, t)
#define VALU3_T(name, e, t) \
  VALU_TF(3, name, 0, (u32 a, u32 b, u32 c), (U a, U b, U c, U ta, U tb, U tc), e, t)

}  // namespace cdnasim
