// The per-instruction dispatcher of the checks, and the rules on undefined values: they may be
// computed with, but not decide an address, a branch, EXEC, or what is stored to memory.
#include "checks.hpp"

namespace cdnasim {

void refresh_attention(Wave& w) {
  w.attention = w.tainted;
  w.attention.merge(w.pending);
  w.attention.merge(w.hazardous);
}

void require_defined(Wave& w, const Ins& I, int arg, int words, u64 lanes, const char* role) {
  const Arg& a = I.args[arg];
  for (int d = 0; d < words; d++) {
    int bit = a.kind == ARG_SGPR ? scalar_bit(a.index + d) : a.index + d;
    if (!w.tainted.has(bit)) continue;
    u64 bad = 0;
    if (a.kind == ARG_SGPR) bad = w.s_undefined[a.index + d] ? lanes : 0;
    else FOR_LANES bad |= (u64)(w.undefined[a.index + d][lane] != 0) << lane;
    if (!(bad &= lanes)) continue;
    report(w, I, UNDEFINED_VALUE, __builtin_ctzll(bad), origin_pc(w, bit), "the %s depends on %s%s",
           role, register_name(bit).c_str(), origin_text(w, bit).c_str());
    return;
  }
}

static void clear_scalar(Wave& w, int sgpr) {
  w.s_undefined[sgpr] = 0;
  w.tainted.remove(scalar_bit(sgpr));
}

// A conditional branch: SCC itself, VCC unless a known bit decides, EXEC (checked when written).
void taint_condition(Wave& w, const Ins& I) {
  if (I.flags & READS_SCC && w.s_undefined[SCC]) {
    report(w, I, UNDEFINED_VALUE, -1, origin_pc(w, scalar_bit(SCC)),
           "branches on an undefined scc%s", origin_text(w, scalar_bit(SCC)).c_str());
    clear_scalar(w, SCC);
  }
  if (I.flags & READS_VCC) {
    u64 undefined = join(w.s_undefined[VCC], w.s_undefined[VCC + 1]);
    if (!undefined || (w.vcc() & ~undefined)) return;
    report(w, I, UNDEFINED_VALUE, __builtin_ctzll(undefined), origin_pc(w, scalar_bit(VCC)),
           "branches on an undefined vcc%s", origin_text(w, scalar_bit(VCC)).c_str());
    clear_scalar(w, VCC);
    clear_scalar(w, VCC + 1);
  }
}

static void check_exec(Wave& w, const Ins& I) {
  u64 undefined = join(w.s_undefined[EXEC], w.s_undefined[EXEC + 1]);
  if (!undefined) return;
  int bit = scalar_bit(w.s_undefined[EXEC] ? EXEC : EXEC + 1);
  report(w, I, UNDEFINED_VALUE, __builtin_ctzll(undefined), origin_pc(w, bit),
         "exec depends on an undefined value%s", origin_text(w, bit).c_str());
  clear_scalar(w, EXEC);
  clear_scalar(w, EXEC + 1);
}

void check_instruction(Wave& w, const Ins& I) {
  i32 checks = w.group->launch->checks;
  if ((checks & CHECK_WAITS) && w.pending.meets(I.touched)) check_pending(w, I);
  if (checks & CHECK_WAIT_STATES) check_wait_states(w, I);
  if (w.tainted.meets(I.touched)) {
    if (I.op->taint) I.op->taint(w, I);
    if ((I.flags & (VALU | SALU | CONTROL)) && !I.op->taint) {
      // Registers that the instruction defines without reading anything undefined.
      for (int s = 0; s < NUM_SGPR; s++)
        if (I.writes.has(scalar_bit(s))) clear_scalar(w, s);
    }
    if (I.writes.has(scalar_bit(EXEC)) || I.writes.has(scalar_bit(EXEC + 1))) check_exec(w, I);
  }
  refresh_attention(w);
}

}  // namespace cdnasim
