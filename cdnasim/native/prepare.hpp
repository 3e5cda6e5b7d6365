// From the records that Python encodes to instructions ready to execute.
#pragma once
#include <deque>
#include <memory>

#include "registry.hpp"

namespace cdnasim {

struct Program {
  std::vector<Ins> code;
  std::deque<DppPlan> plans;  // deques: instructions point into them
  std::deque<std::string> reasons;
};

// An instruction that is not modelled stops the wave that executes it, with a finding.
std::unique_ptr<Program> prepare(const Record* records, int count);

}  // namespace cdnasim
