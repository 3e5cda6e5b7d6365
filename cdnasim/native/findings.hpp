// Recording findings: one entry per kind and instruction, with a count of its occurrences.
#pragma once
#include "state.hpp"

namespace cdnasim {

// `other_pc` names a second instruction (the load, the MFMA), -1 without.
void report(Wave& w, const Ins& I, FindingKind kind, int lane, int other_pc, const char* format,
            ...) __attribute__((format(printf, 6, 7)));

std::string register_name(int bit);
std::string origin_text(Wave& w, int bit);
i32 origin_pc(Wave& w, int bit);

}  // namespace cdnasim
