// The table of operations. Each instruction is registered once, beside its semantics.
#pragma once
#include <string>

#include "state.hpp"

namespace cdnasim {

enum OpFlag : u64 {
  VALU = 1ull << 0,
  SALU = 1ull << 1,
  SMEM = 1ull << 2,
  VMEM = 1ull << 3,
  LDS = 1ull << 4,
  MFMA = 1ull << 5,
  TRANS = 1ull << 6,  // quarter-rate unit: exp, log, rcp, rsq, sqrt, sin, cos
  DOT = 1ull << 7,
  XDL = 1ull << 8,  // MFMA on the matrix unit proper (all but f32 and f64 operands)
  DGEMM = 1ull << 9,
  LOADS = 1ull << 10,
  STORES = 1ull << 11,
  CONTROL = 1ull << 12,
  READS_DST = 1ull << 13,  // the destination is also a source (fmac, d16 loads, swaps)
  READS_SCC = 1ull << 14,
  WRITES_SCC = 1ull << 15,
  READS_VCC = 1ull << 16,  // not named in the text
  WRITES_EXEC = 1ull << 17,
  READS_EXEC = 1ull << 18,
  READS_M0 = 1ull << 19,
  SCALAR_DST = 1ull << 20,   // VALU whose first destination is a scalar register
  LANE_MASK = 1ull << 21,    // the last argument is one bit per lane
  LANE_ACCESS = 1ull << 22,  // readlane, readfirstlane, writelane
  PERMLANE = 1ull << 23,
  HALF_SIGN = 1ull << 24,   // neg and abs act on bit 15
  KEEPS_HIGH = 1ull << 25,  // a 16-bit result leaves the upper half of the register alone
  WRITES_SRC = 1ull << 26,  // swaps: argument 1 is written too
  PACKED = 1ull << 27,
  DIV_FMAS = 1ull << 28,
  HALF_RESULT = 1ull << 29,  // 16-bit result: op_sel[3] picks the half
  ATOMIC = 1ull << 30,
  WIDE64 = 1ull << 31,       // neg and abs act on the high word
  FLOAT_CLAMP = 1ull << 32,  // clamp limits the result to [0, 1]
  INT_CLAMP = 1ull << 33,    // clamp saturates; the operation does it itself
  HALF_SOURCE = 1ull << 34,  // op_sel picks the half of each source
  LDS_DMA_ONLY = 1ull << 35,
  READS_MODE = 1ull << 36,
  WRITES_MODE = 1ull << 37,
};

// How a memory operation moves data.
struct Shape {
  i8 dwords;  // 0 when sub-dword
  i8 bytes;
  bool is_signed;
  i8 half;  // 0 whole register, 1 low half, 2 high half
};

struct Op {
  std::string name;
  u64 flags;
  Handler run;
  Handler taint;  // computes which result bits are undefined, before `run`; null: none are
  int num_dst;
  Shape shape;
  int passes;  // MFMA: passes of four cycles
};

int add_op(Op op);
const Op* find_op(const std::string& name);
int op_index(const std::string& name);
const Op& op_at(int index);
int op_count();

void taint_any(Wave&, const Ins&);     // any undefined source bit spoils the whole result
void taint_scalar(Wave&, const Ins&);  // the same for SALU

// OP(name, flags, num_dst, taint) { body using w and I }
#define OP(name, flags, num_dst, taint)                                                       \
  static void run_##name(Wave& w, const Ins& I);                                              \
  static int registered_##name = add_op({#name, (flags), run_##name, taint, num_dst, {}, 0}); \
  static void run_##name([[maybe_unused]] Wave& w, [[maybe_unused]] const Ins& I)

}  // namespace cdnasim
