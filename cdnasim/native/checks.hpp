// The checks that a purely functional run would not give. checks.cpp holds the dispatcher and the
// undefined-value rules, waits.cpp the s_waitcnt model, hazards.cpp the wait states,
// lds_shadow.hpp the race detector.
#pragma once
#include "findings.hpp"
#include "operands.hpp"

namespace cdnasim {

// Called before an instruction that touches a register needing attention, or whose class is
// always checked.
void check_instruction(Wave& w, const Ins& I);

// s_waitcnt
enum WaitClass { WAIT_VM = 0, WAIT_LDS = 1, WAIT_SMEM = 2 };
void check_pending(Wave& w, const Ins& I);
void issue(Wave& w, const Ins& I);
void wait_for(Wave& w, int vmcnt, int lgkmcnt);
void check_barrier(Wave& w, const Ins& I);

// wait states
bool always_checks_wait_states(u64 flags, const Ins& I);
void check_wait_states(Wave& w, const Ins& I);
void note_wait_states(Wave& w, const Ins& I);

// undefined values
void taint_condition(Wave& w, const Ins& I);
void require_defined(Wave& w, const Ins& I, int arg, int words, u64 lanes, const char* role);

void refresh_attention(Wave& w);

}  // namespace cdnasim
