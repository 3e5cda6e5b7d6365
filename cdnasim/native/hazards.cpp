// Wait states that gfx942 and gfx950 need between two instructions because the hardware does not
// interlock them. Every instruction counts as one wait state, s_nop N as N + 1. The numbers are
// those of the MI300 ISA document, section 4.5, and of LLVM's hazard recognizer for these targets.
#include "checks.hpp"

namespace cdnasim {

constexpr u32 LONGEST_OTHER = 5;

// No state beyond these matters after a matrix operation: gfx950 adds one to `passes + 3`.
static u32 longest_after_matrix(const Ins& mfma) { return (u32)mfma.passes + 4; }

static bool reads_scalar(const Ins& I, const Ins& producer) {
  return producer.writes.meets_scalar(I.reads);
}
static bool reads_vector(const Ins& I, const Ins& producer) {
  return producer.writes.meets_vector(I.reads);
}
static bool writes_vector(const Ins& I, const Ins& producer) {
  return producer.writes.meets_vector(I.writes);
}

static bool overlaps(const Arg& a, const Arg& b) {
  return a.kind == ARG_VGPR && b.kind == ARG_VGPR && a.index < b.index + b.count &&
         b.index < a.index + a.count;
}
static bool is_memory(const Ins& I) { return I.flags & (VMEM | LDS); }

struct Need {
  int states;
  const char* why;
};
static void raise(Need& need, int states, const char* why) {
  if (states > need.states) need = {states, why};
}

// gfx950 needs one state more than gfx942 after all but the shortest matrix operations.
static int matrix_latency(const Wave& w, const Ins& mfma, int extra) {
  int passes = mfma.passes;
  if (!(mfma.flags & XDL)) return passes + extra - 1;
  return passes + extra + (w.group->launch->is_gfx950 && passes != 2 ? 1 : 0);
}

static bool accumulates_into(const Ins& mfma, const Ins& I) {
  const Arg &result = mfma.args[0], &c = I.args[3];
  return (mfma.flags & MFMA) && (I.flags & MFMA) && c.kind == ARG_VGPR &&
         result.index == c.index && result.count == c.count;
}

// `covered`: a later matrix operation wrote exactly the accumulator of I, so that what this one wrote
// of it is gone; LLVM's recognizer, too, looks at the last that overlaps.
static void after_matrix(const Wave& w, const Ins& mfma, const Ins& I, bool covered, Need& need) {
  const Arg& result = mfma.args[0];
  if (I.flags & MFMA) {
    for (int k = 1; k < I.nargs; k++) {
      if (!overlaps(result, I.args[k])) continue;
      if (k != 3) {
        raise(need, matrix_latency(w, mfma, 3), "a matrix result is read as matrix operand A or B");
      } else if (covered) {
        continue;
      } else if (accumulates_into(mfma, I)) {
        raise(need, mfma.passes == 2 ? 2 : 0, "a matrix result is accumulated into");
      } else if (!((I.flags & XDL) && !(mfma.flags & XDL))) {
        raise(need, matrix_latency(w, mfma, 1),
              "a matrix result overlaps the accumulator without being it");
      }
    }
    return;
  }
  if (!(I.flags & VALU) && !is_memory(I)) return;
  if (reads_vector(I, mfma)) raise(need, matrix_latency(w, mfma, 3), "a matrix result is read");
  if (writes_vector(I, mfma))
    raise(need, matrix_latency(w, mfma, 3), "a matrix result is overwritten");
  if (!(mfma.flags & XDL) || mfma.args[3].kind != ARG_VGPR) return;
  const Arg& c = mfma.args[3];
  for (int d = 0; d < c.count; d++)
    if (I.writes.has(c.index + d)) {
      int states = mfma.passes == 2 ? 1 : mfma.passes == 4 ? 3 : mfma.passes == 8 ? 7 : 15;
      raise(need, states, "the accumulator of a matrix operation is overwritten");
      return;
    }
}

static bool writes_part_of_register(const Ins& I) {
  if (!(I.flags & VALU) || (I.flags & MFMA)) return false;
  if (I.mods.sdwa) return I.mods.dst_sel != DWORD;
  return (I.mods.op_sel & 8) && !(I.flags & PACKED);
}

static void after_vector(const Ins& valu, const Ins& I, Need& need) {
  bool vector = I.flags & VALU;
  if ((I.flags & MFMA) && !(valu.flags & DOT) && reads_vector(I, valu))
    raise(need, 2, "a vector result is read by a matrix operation");
  bool wrote_exec = valu.writes.has(scalar_bit(EXEC));
  if ((I.flags & MFMA) && wrote_exec)
    raise(need, 4, "a matrix operation follows a vector write of exec");
  if (vector && (valu.flags & TRANS) && !(I.flags & TRANS) && reads_vector(I, valu))
    raise(need, 1, "the result of a transcendental is read by a vector instruction");
  if (vector && writes_part_of_register(valu) && (reads_vector(I, valu) || writes_vector(I, valu)))
    raise(need, 1, "a partly written register is used");
  if ((valu.flags & DOT) && valu.op != I.op && (vector || is_memory(I)) &&
      (reads_vector(I, valu) || writes_vector(I, valu)))
    raise(need, 3, "the result of a dot product is used by another instruction");
  if ((valu.flags & DOT) && valu.op == I.op &&
      (overlaps(valu.args[0], I.args[1]) || overlaps(valu.args[0], I.args[2])))
    raise(need, 3, "the result of a dot product is a multiplicand of the next");
  if (reads_scalar(I, valu)) {
    if (vector)
      raise(need, 2, "a scalar register written by a vector instruction is read by another");
    if (I.flags & VMEM)
      raise(need, 5,
            "a scalar register written by a vector instruction is read by a memory instruction");
    const Arg& lane = I.args[2];
    if ((I.flags & LANE_ACCESS) && I.nargs > 2 && lane.kind == ARG_SGPR &&
        valu.writes.has(scalar_bit(lane.index)))
      raise(need, 4, "the lane select was written by a vector instruction");
    if ((I.flags & DIV_FMAS) && valu.writes.has(scalar_bit(VCC)))
      raise(need, 4, "v_div_fmas follows a vector write of vcc");
  }
  if ((I.flags & LANE_ACCESS) && wrote_exec)
    raise(need, 4, "a lane access follows a vector write of exec");
  if ((I.flags & LANE_ACCESS) && (I.flags & SCALAR_DST) && reads_vector(I, valu))
    raise(need, 1, "a lane is read from a vector result");
  if (I.dpp && wrote_exec) raise(need, 5, "DPP follows a vector write of exec");
  if ((I.flags & PERMLANE) && (reads_vector(I, valu) || writes_vector(I, valu)))
    raise(need, 2, "a vector result is read by v_permlane");
}

// The data of a store of more than 8 bytes is read late.
static bool is_wide_store(const Ins& I) {
  return (I.flags & VMEM) && (I.flags & STORES) && !(I.flags & ATOMIC) && I.op->shape.dwords > 2;
}
static void after_wide_store(const Ins& store, const Ins& I, Need& need) {
  bool buffer = store.op->name.compare(0, 7, "buffer_") == 0;
  const Arg& data = store.args[buffer ? 0 : 1];
  int states = buffer && store.args[3].kind == ARG_SGPR ? 1 : 2;
  for (int d = 0; d < data.count; d++)
    if (I.writes.has(data.index + d))
      raise(need, states, "the data of a wide store is overwritten");
}

static Need required(const Wave& w, const Ins& before, const Ins& I, bool covered) {
  Need need = {0, ""};
  if (before.flags & MFMA) after_matrix(w, before, I, covered, need);
  else if (before.flags & VALU) after_vector(before, I, need);
  if (I.dpp && reads_vector(I, before)) raise(need, 2, "a register is read by DPP");
  if ((I.flags & VALU) && is_wide_store(before)) after_wide_store(before, I, need);
  bool uses_m0 = (I.flags & READS_M0) || I.mods.lds;
  if (uses_m0 && (before.flags & SALU) && before.writes.has(scalar_bit(M0)))
    raise(need, 1, "m0 was written by the instruction before");
  if ((I.flags & READS_MODE) && (before.flags & WRITES_MODE))
    raise(need, 2, "s_getreg follows s_setreg");
  if ((I.flags & WRITES_MODE) && (before.flags & WRITES_MODE))
    raise(need, 2, "s_setreg follows s_setreg");
  return need;
}

// Beyond a few states only matrix operations matter, and those by their vector registers.
static bool relevant(const Ins& before, const Ins& I, u32 states) {
  if (!(before.flags & MFMA)) return states < LONGEST_OTHER;
  return states < longest_after_matrix(before) && before.touched.meets_vector(I.touched);
}

// Instructions whose own class brings requirements, whatever registers need attention.
bool always_checks_wait_states(u64 flags, const Ins& I) {
  if (flags & (MFMA | LANE_ACCESS | DIV_FMAS | PERMLANE | READS_M0 | READS_MODE | WRITES_MODE))
    return true;
  if (I.dpp || I.mods.lds) return true;
  return (flags & VMEM) && (I.reads.word[8] | I.reads.word[9]);
}

void check_wait_states(Wave& w, const Ins& I) {
  bool live = w.clock < w.hazard_until;
  if (!live) w.hazardous = {};
  if (!I.always_checked && !(live && w.hazardous.meets(I.touched))) return;
  u32 horizon = live && w.longest_hazard > LONGEST_OTHER ? w.longest_hazard : LONGEST_OTHER;
  bool covered = false;
  for (u32 back = 1; back <= RECENT && back <= w.num_recent; back++) {
    const Issued& e = w.recent[(w.num_recent - back) % RECENT];
    u32 states = w.clock - e.clock - 1;
    if (states >= horizon) break;
    if (!relevant(*e.ins, I, states)) continue;
    Need need = required(w, *e.ins, I, covered);
    covered = covered || accumulates_into(*e.ins, I);
    if (need.states <= (int)states) continue;
    report(w, I, WAIT_STATES, -1, e.ins->pc, "%s after %u wait state%s, %d needed (add s_nop %d)",
           need.why, states, states == 1 ? "" : "s", need.states, need.states - (int)states - 1);
    break;
  }
}

// After an instruction: remember it, and which registers make a later one check.
void note_wait_states(Wave& w, const Ins& I) {
  w.recent[w.num_recent++ % RECENT] = {&I, w.clock};
  RegisterSet watched = {};
  u32 until = w.clock + 1;
  if (I.flags & MFMA) {
    watched = I.writes;
    if (I.args[3].kind == ARG_VGPR)
      for (int d = 0; d < I.args[3].count; d++) watched.add(I.args[3].index + d);
    u32 longest = longest_after_matrix(I);
    until += longest;
    if (longest > w.longest_hazard) w.longest_hazard = longest;
  } else if (I.flags & VALU) {
    watched.word[8] = I.writes.word[8];
    watched.word[9] = I.writes.word[9];
    if ((I.flags & (TRANS | DOT)) || writes_part_of_register(I)) watched = I.writes;
    until += LONGEST_OTHER;
  } else if (is_wide_store(I)) {
    watched = I.reads;
    until += LONGEST_OTHER;
  }
  if (!watched.any()) return;
  w.hazardous.merge(watched);
  w.attention.merge(watched);
  if (until > w.hazard_until) w.hazard_until = until;
}

}  // namespace cdnasim
