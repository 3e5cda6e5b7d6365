// Vector operations that select between lanes or move data across them.
#include "operands.hpp"

namespace cdnasim {

// ---- select: lane bit 1 takes the second source. The mask is the last argument, VCC by default.
static u64 select_mask(Wave& w, const Ins& I) {
  return I.nargs > 3 ? scalar64(w, I.args[3]) : w.vcc();
}
static void taint_cndmask(Wave& w, const Ins& I) {
  Lanes t0, t1, result;
  const u32 *ta = source_undefined(w, I, 1, 0, t0), *tb = source_undefined(w, I, 2, 0, t1);
  u64 mask = select_mask(w, I);
  u64 unknown = I.nargs > 3 ? scalar64_undefined(w, I.args[3])
                            : join(w.s_undefined[VCC], w.s_undefined[VCC + 1]);
  FOR_LANES result.at[lane] = unknown >> lane & 1 ? ~0u : mask >> lane & 1 ? tb[lane] : ta[lane];
  finish_undefined(w, I, result);
}
OP(v_cndmask_b32, VALU | LANE_MASK, 1, taint_cndmask) {
  Lanes s0, s1, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  u64 mask = select_mask(w, I);
  FOR_LANES result.at[lane] = mask >> lane & 1 ? b[lane] : a[lane];
  finish(w, I, result);
}

// ---- one lane to or from a scalar register; all of them ignore EXEC but readfirstlane
static int named_lane(Wave& w, const Ins& I) { return scalar(w, I.args[2]) & 63; }
static void taint_readfirstlane(Wave& w, const Ins& I) {
  const Arg& a = I.args[1];
  u32 t = a.kind == ARG_VGPR ? w.undefined[a.index][first_active(w)] : 0;
  set_scalar_undefined(w, I, I.args[0].index, t);
}
OP(v_readfirstlane_b32, VALU | SCALAR_DST | LANE_ACCESS, 1, taint_readfirstlane) {
  set_scalar(w, I.args[0], scalar(w, I.args[1]));
}
static void taint_readlane(Wave& w, const Ins& I) {
  set_scalar_undefined(w, I, I.args[0].index, w.undefined[I.args[1].index][named_lane(w, I)]);
}
OP(v_readlane_b32, VALU | SCALAR_DST | LANE_ACCESS, 1, taint_readlane) {
  set_scalar(w, I.args[0], w.v[I.args[1].index][named_lane(w, I)]);
}
static void taint_writelane(Wave& w, const Ins& I) {
  const Arg& a = I.args[1];
  int reg = I.args[0].index;
  w.undefined[reg][named_lane(w, I)] = a.kind == ARG_SGPR ? w.s_undefined[a.index] : 0;
  u32 any = 0;
  FOR_LANES any |= w.undefined[reg][lane];
  if (!any) w.tainted.remove(reg);
}
OP(v_writelane_b32, VALU | LANE_ACCESS | READS_DST, 1, taint_writelane) {
  w.v[I.args[0].index][named_lane(w, I)] = scalar(w, I.args[1]);
}

// ---- counts of mask bits below this lane, in the low and high half of the wave
static u32 bits_below(u32 mask, int lane) {
  return (u32)__builtin_popcount(lane >= 32 ? mask : lane <= 0 ? 0 : mask & ((1u << lane) - 1));
}
OP(v_mbcnt_lo_u32_b32, VALU, 1, taint_any) {
  Lanes s0, s1, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  FOR_LANES result.at[lane] = b[lane] + bits_below(a[lane], lane);
  finish(w, I, result);
}
OP(v_mbcnt_hi_u32_b32, VALU, 1, taint_any) {
  Lanes s0, s1, result;
  const u32 *a = source(w, I, 1, s0), *b = source(w, I, 2, s1);
  FOR_LANES result.at[lane] = b[lane] + bits_below(a[lane], lane - 32);
  finish(w, I, result);
}

// ---- swaps write both registers
static void settle_swap(Wave& w, const Ins& I) {
  int d = I.args[0].index, s = I.args[1].index;
  Origin from_d = w.origin[d], from_s = w.origin[s];
  u32 any_d = 0, any_s = 0;
  FOR_LANES any_d |= w.undefined[d][lane], any_s |= w.undefined[s][lane];
  auto settle = [&](int reg, u32 any, Origin origin) {
    if (!any) return w.tainted.remove(reg);
    if (!w.tainted.has(reg)) w.origin[reg] = origin;
    w.tainted.add(reg);
    w.attention.add(reg);
  };
  settle(d, any_d, from_s);
  settle(s, any_s, from_d);
}
static void taint_swap(Wave& w, const Ins& I) {
  Lanes a, d;
  memcpy(a.at, w.undefined[I.args[1].index], sizeof a.at);
  memcpy(d.at, w.undefined[I.args[0].index], sizeof d.at);
  blend(w, w.undefined[I.args[0].index], a.at);
  blend(w, w.undefined[I.args[1].index], d.at);
  settle_swap(w, I);
}
OP(v_swap_b32, VALU | READS_DST | WRITES_SRC, 1, taint_swap) {
  Lanes a, d;
  memcpy(a.at, w.v[I.args[1].index], sizeof a.at);
  memcpy(d.at, w.v[I.args[0].index], sizeof d.at);
  blend(w, w.v[I.args[0].index], a.at);
  blend(w, w.v[I.args[1].index], d.at);
}
// gfx950: exchange the upper half of vdst with the lower half of src, in groups of 2 * WIDTH lanes.
template <int WIDTH>
static void swap_halves(u32* d, u32* s) {
  for (int group = 0; group < LANES; group += 2 * WIDTH)
    for (int i = group; i < group + WIDTH; i++) {
      u32 x = s[i];
      s[i] = d[i + WIDTH];
      d[i + WIDTH] = x;
    }
}
template <int WIDTH>
static void taint_permlane(Wave& w, const Ins& I) {
  swap_halves<WIDTH>(w.undefined[I.args[0].index], w.undefined[I.args[1].index]);
  settle_swap(w, I);
}
OP(v_permlane32_swap_b32, VALU | PERMLANE | READS_DST | WRITES_SRC, 1, taint_permlane<32>) {
  swap_halves<32>(w.v[I.args[0].index], w.v[I.args[1].index]);
}
OP(v_permlane16_swap_b32, VALU | PERMLANE | READS_DST | WRITES_SRC, 1, taint_permlane<16>) {
  swap_halves<16>(w.v[I.args[0].index], w.v[I.args[1].index]);
}

}  // namespace cdnasim
