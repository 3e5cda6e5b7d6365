#include "operands.hpp"

namespace cdnasim {

static inline bool sdwa_source(const Ins& I, int k) {
  int first = I.op->num_dst;
  return I.mods.sdwa && (k == first || k == first + 1);
}
static inline int sdwa_part(const Ins& I, int k) {
  return k == I.op->num_dst ? I.mods.src0_sel : I.mods.src1_sel;
}

// Steps shared by the value plane and the plane of undefined bits: DPP, SDWA part, op_sel half.
static void rearrange(Wave& w, const Ins& I, int k, Lanes& x) {
  if (I.dpp && k == I.op->num_dst) {
    Lanes moved;
    u64 exec = w.exec();
    FOR_LANES {
      int from = I.dpp->from[lane];
      bool valid = (I.dpp->in_range >> lane & 1) && (exec >> from & 1);
      moved.at[lane] = valid ? x.at[from] : 0;
    }
    x = moved;
  }
  if (sdwa_source(I, k)) {
    int part = sdwa_part(I, k);
    bool sign = I.args[k].flags & FLAG_SEXT;
    FOR_LANES x.at[lane] = select_part(x.at[lane], part, sign);
  }
  if ((I.flags & HALF_SOURCE) && I.mods.op_sel >> (k - I.op->num_dst) & 1)
    FOR_LANES x.at[lane] >>= 16;
}

const u32* source_slow(Wave& w, const Ins& I, int k, int dword, Lanes& scratch) {
  const Arg& a = I.args[k];
  if (a.kind == ARG_VGPR) {
    memcpy(scratch.at, w.v[a.index + dword], sizeof scratch.at);
  } else {
    u32 x = a.kind == ARG_SGPR ? w.s[a.index + dword] : (u32)(dword ? a.high : a.value);
    FOR_LANES scratch.at[lane] = x;
  }
  rearrange(w, I, k, scratch);
  bool sign_word = !(I.flags & WIDE64) || dword == 1;
  u32 sign = sign_mask(I);
  if (sign_word && (a.flags & FLAG_ABS)) FOR_LANES scratch.at[lane] &= ~sign;
  if (sign_word && (a.flags & FLAG_NEG)) FOR_LANES scratch.at[lane] ^= sign;
  return scratch.at;
}

const u32* source_undefined(Wave& w, const Ins& I, int k, int dword, Lanes& scratch) {
  const Arg& a = I.args[k];
  if (a.plain) return w.undefined[a.index + dword];
  if (a.kind == ARG_VGPR) {
    memcpy(scratch.at, w.undefined[a.index + dword], sizeof scratch.at);
  } else {
    u32 x = a.kind == ARG_SGPR ? w.s_undefined[a.index + dword] : 0;
    FOR_LANES scratch.at[lane] = x;
  }
  rearrange(w, I, k, scratch);
  return scratch.at;
}

// Lanes that the instruction writes: EXEC, less those that DPP disables.
u64 written_lanes(Wave& w, const Ins& I) {
  u64 exec = w.exec();
  if (!I.dpp) return exec;
  u64 valid = 0;
  FOR_LANES valid |= (I.dpp->in_range >> lane & exec >> I.dpp->from[lane] & 1) << lane;
  return exec & I.dpp->enabled & (I.mods.bound_ctrl ? ~0ull : valid);
}

// Put the result into the byte or half that SDWA or op_sel names, keeping what they keep.
static u32 place(const Ins& I, u32 result, u32 old) {
  const Modifiers& m = I.mods;
  if (m.sdwa && m.dst_sel != DWORD) {
    int bits = m.dst_sel < WORD_0 ? 8 : 16;
    int shift = m.dst_sel < WORD_0 ? 8 * m.dst_sel : 16 * (m.dst_sel - WORD_0);
    u32 field = ((1u << bits) - 1) << shift, part = result << shift & field;
    if (m.dst_unused == 2) return (old & ~field) | part;
    if (m.dst_unused == 1) return (u32)sign_extend(result, bits) << shift;
    return part;
  }
  if (I.flags & HALF_RESULT) {
    if (m.op_sel & 8) return (old & 0xffff) | result << 16;
    if (I.flags & KEEPS_HIGH) return (old & 0xffff0000) | (result & 0xffff);
  }
  return result;
}

static float scaled(float x, int omod) {
  return omod == 1 ? x * 2 : omod == 2 ? x * 4 : omod == 3 ? x * .5f : x;
}
static float clamped(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }

void finish_slow(Wave& w, const Ins& I, Lanes& result, int dword) {
  const Modifiers& m = I.mods;
  bool limit = m.clamp && (I.flags & FLOAT_CLAMP);
  if ((m.omod || limit) && (I.flags & HALF_RESULT)) {
    FOR_LANES {
      float x = scaled(half_to_float(result.at[lane]), m.omod);
      result.at[lane] = float_to_half(limit ? clamped(x) : x);
    }
  } else if ((m.omod || limit) && !(I.flags & WIDE64)) {
    FOR_LANES {
      float x = scaled(as_float(result.at[lane]), m.omod);
      result.at[lane] = as_bits(limit ? clamped(x) : x);
    }
  }
  u32* to = w.v[I.args[0].index + dword];
  u64 lanes = written_lanes(w, I);
  FOR_LANES if (lanes >> lane & 1) to[lane] = place(I, result.at[lane], to[lane]);
}

static void note_undefined(Wave& w, const Ins& I, int bit, bool any) {
  if (!any) {
    w.tainted.remove(bit);
    return;
  }
  w.tainted.add(bit);
  w.attention.add(bit);
  for (int from = 0; from < NUM_VGPR + NUM_SGPR; from++)
    if (I.reads.has(from) && w.tainted.has(from) && from != bit) {
      Origin o = w.origin[from];
      w.origin[bit] = o.pc < 0 ? Origin{I.pc, o.reg} : o;
      return;
    }
}

void finish_undefined(Wave& w, const Ins& I, const Lanes& undefined, int dword) {
  int reg = I.args[0].index + dword;
  u64 lanes = written_lanes(w, I);
  u32 any = 0;
  FOR_LANES {
    u32& bits = w.undefined[reg][lane];
    if (lanes >> lane & 1) bits = place(I, undefined.at[lane], bits);
    any |= bits;
  }
  note_undefined(w, I, reg, any);
}

void set_scalar_undefined(Wave& w, const Ins& I, int sgpr, u32 undefined) {
  w.s_undefined[sgpr] = undefined;
  note_undefined(w, I, scalar_bit(sgpr), undefined);
}
void set_scalar64_undefined(Wave& w, const Ins& I, int sgpr, u64 undefined) {
  set_scalar_undefined(w, I, sgpr, (u32)undefined);
  set_scalar_undefined(w, I, sgpr + 1, (u32)(undefined >> 32));
}

// Undefined lanes of the sources, whatever the operation: a lane is spoilt by any bit in it.
static Lanes undefined_lanes(Wave& w, const Ins& I) {
  Lanes all = {}, scratch;
  for (int k = I.op->num_dst; k < I.nargs; k++) {
    const Arg& a = I.args[k];
    if (a.kind != ARG_VGPR && a.kind != ARG_SGPR) continue;
    if ((I.flags & LANE_MASK) && k == I.nargs - 1) {
      u64 mask = scalar64_undefined(w, a);
      FOR_LANES all.at[lane] |= mask >> lane & 1;
      continue;
    }
    for (int d = 0; d < a.count; d++) {
      const u32* t = source_undefined(w, I, k, d, scratch);
      FOR_LANES all.at[lane] |= t[lane];
    }
  }
  if (I.flags & READS_DST)
    for (int d = 0; d < I.args[0].count; d++)
      FOR_LANES all.at[lane] |= w.undefined[I.args[0].index + d][lane];
  if (I.flags & READS_VCC)
    FOR_LANES all.at[lane] |= join(w.s_undefined[VCC], w.s_undefined[VCC + 1]) >> lane & 1;
  FOR_LANES all.at[lane] = spread(all.at[lane]);
  return all;
}

void taint_any(Wave& w, const Ins& I) {
  Lanes all = undefined_lanes(w, I);
  for (int k = 0; k < I.op->num_dst; k++) {
    const Arg& a = I.args[k];
    if (a.kind == ARG_SGPR) {
      u64 mask = 0;
      FOR_LANES mask |= (u64)(all.at[lane] & 1) << lane;
      set_scalar64_undefined(w, I, a.index, mask & w.exec());
    } else {
      for (int d = 0; d < a.count; d++) finish_undefined(w, I, all, d);
    }
  }
}

void taint_scalar(Wave& w, const Ins& I) {
  u32 any = 0;
  for (int k = I.op->num_dst; k < I.nargs; k++)
    if (I.args[k].kind == ARG_SGPR)
      for (int d = 0; d < I.args[k].count; d++) any |= w.s_undefined[I.args[k].index + d];
  if (I.flags & READS_SCC) any |= w.s_undefined[SCC];
  if (I.flags & READS_DST) any |= w.s_undefined[I.args[0].index];
  any = spread(any);
  for (int k = 0; k < I.op->num_dst; k++)
    for (int d = 0; d < I.args[k].count; d++) set_scalar_undefined(w, I, I.args[k].index + d, any);
  if (I.flags & WRITES_SCC) set_scalar_undefined(w, I, SCC, any);
}

}  // namespace cdnasim
