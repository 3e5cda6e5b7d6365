// Program flow, barriers, waits and the instructions that only affect timing or caches.
#include "checks.hpp"

namespace cdnasim {

OP(s_endpgm, CONTROL, 0, nullptr) { w.finished = true; }
OP(s_branch, CONTROL, 0, nullptr) { w.next_pc = I.mods.target; }

// A branch on an undefined condition is a finding (checks.cpp reads the flags below).
#define BRANCH(name, flags, condition)              \
  OP(name, CONTROL | (flags), 0, taint_condition) { \
    if (condition) w.next_pc = I.mods.target;       \
  }
BRANCH(s_cbranch_scc0, READS_SCC, !w.s[SCC])
BRANCH(s_cbranch_scc1, READS_SCC, w.s[SCC])
BRANCH(s_cbranch_vccz, READS_VCC, !w.vcc())
BRANCH(s_cbranch_vccnz, READS_VCC, w.vcc())
BRANCH(s_cbranch_execz, READS_EXEC, !w.exec())
BRANCH(s_cbranch_execnz, READS_EXEC, w.exec())

OP(s_barrier, CONTROL, 0, nullptr) {
  check_barrier(w, I);
  w.vm_done_at_barrier = w.vm_done;
  w.at_barrier = true;
}
OP(s_waitcnt, CONTROL, 0, nullptr) { wait_for(w, I.mods.offset, I.mods.offset1); }
OP(s_nop, CONTROL, 0, nullptr) { w.clock += (u32)I.mods.offset; }

// Another wave may be what this one waits for: let the others run.
OP(s_sleep, CONTROL, 0, nullptr) { w.yielded = true; }

#define NO_EFFECT(name) \
  OP(name, CONTROL, 0, nullptr) {}
NO_EFFECT(s_setprio)
NO_EFFECT(s_icache_inv)
NO_EFFECT(s_dcache_inv)
NO_EFFECT(s_dcache_wb)
NO_EFFECT(s_sendmsg)
NO_EFFECT(s_ttracedata)
NO_EFFECT(buffer_inv)
NO_EFFECT(buffer_wbl2)

OP(v_nop, VALU, 0, nullptr) {}

OP(s_trap, CONTROL, 0, nullptr) {
  report(w, I, STUCK, -1, -1, "the kernel executed s_trap %d (an assertion or unreachable code)",
         I.mods.offset);
  throw Stop{};
}

}  // namespace cdnasim
