#include "prepare.hpp"

#include <map>

#include "checks.hpp"

namespace cdnasim {

// ---- the table of operations
struct Table {
  std::vector<Op> ops;
  std::map<std::string, int> index;
};
static Table& table() {
  static Table instance;
  return instance;
}
int add_op(Op op) {
  Table& t = table();
  t.index[op.name] = (int)t.ops.size();
  t.ops.push_back(std::move(op));
  return 0;
}
int op_index(const std::string& name) {
  auto found = table().index.find(name);
  return found == table().index.end() ? -1 : found->second;
}
const Op& op_at(int index) { return table().ops[index]; }
int op_count() { return (int)table().ops.size(); }

// ---- DPP controls, MI300 ISA section 6.4: where each lane reads from
static void plan_dpp(const Modifiers& m, DppPlan& plan) {
  int control = m.dpp, n = control & 15;
  plan.in_range = plan.enabled = 0;
  FOR_LANES {
    int row = lane & ~15, q = lane & 15, from = lane;
    bool valid = true;
    if (control < 0x100) from = (lane & ~3) | (control >> 2 * (lane & 3) & 3);  // quad_perm
    else if (control < 0x110) from = lane + n, valid = q + n < 16;              // row_shl
    else if (control < 0x120) from = lane - n, valid = q >= n;                  // row_shr
    else if (control < 0x130) from = row | ((q - n) & 15);                      // row_ror
    else if (control == 0x130) from = lane + 1, valid = lane < 63;              // wave_shl
    else if (control == 0x134) from = (lane + 1) & 63;                          // wave_rol
    else if (control == 0x138) from = lane - 1, valid = lane > 0;               // wave_shr
    else if (control == 0x13c) from = (lane - 1) & 63;                          // wave_ror
    else if (control == 0x140) from = row | (15 - q);                           // row_mirror
    else if (control == 0x141) from = lane ^ 7;                                 // row_half_mirror
    else if (control == 0x142) from = row - 1, valid = row > 0;                 // row_bcast:15
    else if (control == 0x143) from = 31, valid = lane >= 32;                   // row_bcast:31
    else if (control >= 0x150 && control < 0x160) from = row | n;               // row_newbcast
    else throw std::string("unknown DPP control");
    plan.from[lane] = (u8)(valid ? from : 0);
    plan.in_range |= (u64)valid << lane;
    bool enabled = (m.row_mask >> (lane >> 4) & 1) && (m.bank_mask >> (q >> 2) & 1);
    plan.enabled |= (u64)enabled << lane;
  }
}

static void check_supported(const Op& op, const Modifiers& m) {
  if (m.clamp && !(op.flags & (FLOAT_CLAMP | INT_CLAMP)))
    throw op.name + " with clamp is not modelled";
  bool scaled = op.name.find("f8f6f4") != std::string::npos;
  if ((op.flags & MFMA) && !scaled && (m.cbsz || m.blgp || m.abid))
    throw op.name + " with cbsz, abid or blgp is not modelled";
  if (scaled && (m.cbsz > 4 || m.blgp > 4)) throw op.name + " has an unknown operand format";
}

static void add_range(RegisterSet& set, const Arg& a) {
  for (int d = 0; d < a.count; d++) {
    if (a.kind == ARG_VGPR && a.index + d < NUM_VGPR) set.add(a.index + d);
    if (a.kind == ARG_SGPR && a.index + d < NUM_SGPR) set.add(scalar_bit(a.index + d));
  }
}
static void add_pair(RegisterSet& set, int sgpr) {
  set.add(scalar_bit(sgpr));
  set.add(scalar_bit(sgpr + 1));
}

static int destinations(const Op& op, const Modifiers& m) {
  if (m.lds) return 0;
  if ((op.flags & ATOMIC) && (op.flags & VMEM)) return m.returns ? 1 : 0;
  return op.num_dst;
}

static void find_registers(Ins& I) {
  u64 flags = I.flags;
  bool buffer_atomic = (flags & ATOMIC) && I.op->name.compare(0, 7, "buffer_") == 0;
  for (int k = 0; k < I.nargs; k++) {
    bool is_dst = k < I.num_dst;
    if (is_dst) add_range(I.writes, I.args[k]);
    if (!is_dst || (flags & READS_DST) || buffer_atomic) add_range(I.reads, I.args[k]);
  }
  if (I.mods.sdwa && I.mods.dst_unused == 2 && I.num_dst) add_range(I.reads, I.args[0]);
  if (flags & WRITES_SRC) add_range(I.writes, I.args[1]);
  if (flags & READS_SCC) I.reads.add(scalar_bit(SCC));
  if (flags & WRITES_SCC) I.writes.add(scalar_bit(SCC));
  bool implicit_mask = I.op->name == "v_cndmask_b32" && I.nargs == 3;
  if ((flags & READS_VCC) || implicit_mask) add_pair(I.reads, VCC);
  if (flags & READS_EXEC) add_pair(I.reads, EXEC);
  if (flags & WRITES_EXEC) add_pair(I.writes, EXEC);
  if (flags & READS_M0 || I.mods.lds) I.reads.add(scalar_bit(M0));
  I.touched = I.reads;
  I.touched.merge(I.writes);
}

// Which halves of an f8f6f4 product are fp8 decides how long it takes.
static int matrix_passes(const Op& op, const Modifiers& m) {
  bool scaled = op.name.find("f8f6f4") != std::string::npos;
  return scaled && m.cbsz > 1 && m.blgp > 1 ? op.passes / 2 : op.passes;
}

static void check_indices(const Ins& I) {
  for (int k = 0; k < I.nargs; k++) {
    const Arg& a = I.args[k];
    int limit = a.kind == ARG_VGPR ? NUM_VGPR : NUM_SGPR;
    if ((a.kind == ARG_VGPR || a.kind == ARG_SGPR) && (a.index < 0 || a.index + a.count > limit))
      throw I.op->name + ": register index out of range";
  }
}

static void run_unsupported(Wave& w, const Ins& I) {
  report(w, I, UNSUPPORTED, -1, -1, "%s", I.reason);
  throw Stop{};
}
static const Op unsupported = {"unsupported", 0, run_unsupported, nullptr, 0, {}, 0};

static void make_unsupported(Ins& I, int pc, const std::string& reason, Program& program) {
  memset((void*)&I, 0, sizeof I);
  program.reasons.push_back(reason);
  I.op = &unsupported;
  I.run = run_unsupported;
  I.pc = pc;
  I.reason = program.reasons.back().c_str();
}

static void prepare_one(const Record& r, int pc, Ins& I, Program& program) {
  if (r.op < 0) throw std::string("the simulator does not know this instruction");
  const Op& op = op_at(r.op);
  memset((void*)&I, 0, sizeof I);
  I.op = &op;
  I.run = op.run;
  I.flags = op.flags;
  I.pc = pc;
  I.nargs = r.nargs;
  I.mods = r.mods;
  I.passes = matrix_passes(op, r.mods);
  I.num_dst = destinations(op, r.mods);
  check_supported(op, r.mods);
  if (r.mods.dpp >= 0) {
    program.plans.emplace_back();
    plan_dpp(r.mods, program.plans.back());
    I.dpp = &program.plans.back();
  }
  for (int k = 0; k < 6; k++) {
    const RecordArg& from = r.args[k];
    bool sdwa = r.mods.sdwa && (k == op.num_dst || k == op.num_dst + 1);
    bool half = (op.flags & HALF_SOURCE) && r.mods.op_sel;
    bool plain =
        from.kind == ARG_VGPR && !from.flags && !sdwa && !half && !(I.dpp && k == op.num_dst);
    I.args[k] = {(u8)from.kind, (u8)from.flags, (u8)from.count, plain,
                 from.index,    from.value,     from.high};
  }
  bool part = (op.flags & HALF_RESULT) && ((r.mods.op_sel & 8) || (op.flags & KEEPS_HIGH));
  bool sdwa_part = r.mods.sdwa && r.mods.dst_sel != DWORD;
  I.special_result =
      r.mods.omod || (r.mods.clamp && (op.flags & FLOAT_CLAMP)) || sdwa_part || I.dpp || part;
  check_indices(I);
  find_registers(I);
  I.is_memory = op.flags & (VMEM | LDS | SMEM);
  I.always_checked = always_checks_wait_states(op.flags, I);
}

std::unique_ptr<Program> prepare(const Record* records, int count) {
  auto program = std::make_unique<Program>();
  program->code.resize(count);
  for (int pc = 0; pc < count; pc++) {
    try {
      prepare_one(records[pc], pc, program->code[pc], *program);
    } catch (const std::string& reason) {
      make_unsupported(program->code[pc], pc, reason, *program);
    }
  }
  return program;
}

}  // namespace cdnasim
