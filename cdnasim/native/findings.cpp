#include "findings.hpp"

#include <cstdarg>
#include <cstdio>

namespace cdnasim {

void report(Wave& w, const Ins& I, FindingKind kind, int lane, int other_pc, const char* format,
            ...) {
  std::vector<Finding>& all = *w.group->findings;
  for (Finding& f : all)
    if (f.kind == kind && f.pc == I.pc) {
      f.occurrences++;
      return;
    }
  Finding f = {};
  f.kind = kind;
  f.pc = I.pc;
  f.other_pc = other_pc;
  f.wave = (i32)w.index;
  f.lane = lane;
  memcpy(f.group, w.group->id, sizeof f.group);
  f.occurrences = 1;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(f.message, sizeof f.message, format, arguments);
  va_end(arguments);
  all.push_back(f);
}

std::string register_name(int bit) {
  if (bit < 256) return "v" + std::to_string(bit);
  if (bit < NUM_VGPR) return "a" + std::to_string(bit - 256);
  int s = bit - NUM_VGPR;
  switch (s) {
    case VCC:
    case VCC + 1: return "vcc";
    case EXEC:
    case EXEC + 1: return "exec";
    case M0: return "m0";
    case SCC: return "scc";
  }
  return s >= 108 && s < 124 ? "ttmp" + std::to_string(s - 108) : "s" + std::to_string(s);
}

// Where the undefined value in a register came from.
std::string origin_text(Wave& w, int bit) {
  Origin o = w.origin[bit];
  if (o.reg < 0) return ", read from LDS or scratch that was never written";
  if (o.pc < 0) return ", which was never written";
  return ", derived from " + register_name(o.reg) + ", which was never written";
}
i32 origin_pc(Wave& w, int bit) { return w.origin[bit].pc; }

}  // namespace cdnasim
