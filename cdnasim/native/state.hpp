// The machine state: decoded instructions, waves, workgroups, and the launch description.
#pragma once
#include <string>
#include <vector>

#include "types.hpp"

namespace cdnasim {

// Scalar register numbers with a meaning of their own. SCC lives in an otherwise unused slot.
enum { FLAT_SCRATCH = 102, VCC = 106, M0 = 124, SCC = 125, EXEC = 126 };
constexpr int NUM_VGPR = 512;  // v0..v255, then a0..a255
constexpr int NUM_SGPR = 128;
constexpr u32 POISON = 0xcdcdcdcd;

// One bit per register: 512 vector registers, then 128 scalar registers.
struct RegisterSet {
  u64 word[10];
  void add(int bit) { word[bit >> 6] |= 1ull << (bit & 63); }
  void remove(int bit) { word[bit >> 6] &= ~(1ull << (bit & 63)); }
  bool has(int bit) const { return word[bit >> 6] >> (bit & 63) & 1; }
  bool any() const {
    u64 all = 0;
    for (u64 w : word) all |= w;
    return all != 0;
  }
  bool meets(const RegisterSet& other) const {
    u64 all = 0;
    for (int i = 0; i < 10; i++) all |= word[i] & other.word[i];
    return all != 0;
  }
  void merge(const RegisterSet& other) {
    for (int i = 0; i < 10; i++) word[i] |= other.word[i];
  }
  bool meets_vector(const RegisterSet& other) const {
    u64 all = 0;
    for (int i = 0; i < 8; i++) all |= word[i] & other.word[i];
    return all != 0;
  }
  bool meets_scalar(const RegisterSet& other) const {
    return (word[8] & other.word[8]) | (word[9] & other.word[9]);
  }
};
inline int scalar_bit(int sgpr) { return NUM_VGPR + sgpr; }

// ---- decoded instructions. Record is what Python writes (encode.py mirrors it field by field).
enum ArgKind { ARG_NONE = 0, ARG_VGPR = 1, ARG_SGPR = 2, ARG_LITERAL = 3, ARG_OFF = 4 };
enum ArgFlag { FLAG_NEG = 1, FLAG_ABS = 2, FLAG_SEXT = 4 };

struct RecordArg {
  i32 kind, index, flags, count, value, high;
};
struct Modifiers {
  i32 offset, offset1, op_sel, op_sel_hi, neg_lo, neg_hi, clamp, omod;
  i32 dpp, row_mask, bank_mask, bound_ctrl;  // dpp is the control field, -1 without
  i32 sdwa, dst_sel, dst_unused, src0_sel, src1_sel;
  i32 cbsz, abid, blgp, offen, idxen, lds, returns, target, truth_table;
};
struct Record {
  i32 op, nargs;
  RecordArg args[6];
  Modifiers mods;
};

struct DppPlan {
  u8 from[LANES];
  u64 in_range, enabled;
};

struct Op;
struct Wave;
struct Ins;
using Handler = void (*)(Wave&, const Ins&);

struct Arg {
  u8 kind, flags, count;
  bool plain;  // a vector register without modifiers: its storage can be read in place
  i32 index, value, high;
};
struct Ins {
  RegisterSet touched;
  Handler run;
  const Op* op;
  u64 flags;
  i32 pc, nargs, num_dst, passes;
  bool always_checked, is_memory;
  bool special_result;
  Arg args[6];
  Modifiers mods;
  RegisterSet reads, writes;
  const DppPlan* dpp;
  const char* reason;  // why it cannot be executed
};

// ---- memory and findings
struct Range {
  u64 begin, end;
};

enum FindingKind {
  OUT_OF_BOUNDS,
  LDS_RACE,
  MISSING_WAIT,
  UNDEFINED_VALUE,
  WAIT_STATES,
  UNSUPPORTED,
  STUCK
};
struct Finding {
  i32 kind, pc, other_pc, wave, lane, group[3];
  u64 occurrences;
  char message[200];
};

struct Launch {
  u64 kernarg, dispatch_packet, flat_scratch, max_instructions, code_base, trace_capacity;
  i32 entry, grid[3], block[3];
  i32 lds_bytes, scratch_bytes, is_gfx950, num_vgprs, num_agprs;
  i32 kernarg_sgpr, dispatch_ptr_sgpr, user_sgprs, preload_sgpr, preload_dwords, preload_offset;
  i32 group_id_enable[3];
  i32 float_mode, num_threads, num_ranges, checks, trace_group[3], trace_wave, num_instructions;
};
enum CheckBit { CHECK_RACES = 1, CHECK_WAITS = 2, CHECK_UNDEFINED = 4, CHECK_WAIT_STATES = 8 };

struct TraceEntry {
  i32 pc;
  u32 scc;
  u64 exec;
  u32 first[LANES];  // the first destination register, after execution
};

// Thrown when a wave cannot go on; the finding has been recorded.
struct Stop {};

struct LdsShadow;

// What the waves of one workgroup share.
struct Group {
  u8* lds;
  LdsShadow* shadow;
  const Launch* launch;
  const std::vector<Range>* ranges;
  std::vector<Finding>* findings;
  std::vector<u64>* counts;
  std::vector<TraceEntry>* trace;
  std::vector<Wave*> waves;
  i32 id[3];
  u32 epoch;  // barriers passed
};

struct Issued {
  const Ins* ins;
  u32 clock;
};
constexpr int RECENT = 32;

// Where an undefined value came from: the register or LDS byte that nobody wrote.
struct Origin {
  i32 pc, reg;
};

struct Wave {
  alignas(64) u32 v[NUM_VGPR][LANES];
  alignas(64) u32 undefined[NUM_VGPR][LANES];  // bit set: this bit of the value is undefined
  alignas(64) u32 exec_lanes[LANES];           // EXEC as one full word per lane
  u64 exec_key;
  alignas(8) u32 s[NUM_SGPR], s_undefined[NUM_SGPR];

  // `attention` is the union of the three sets below it: an instruction that touches none of
  // its registers needs no further check.
  alignas(64) RegisterSet attention;
  RegisterSet tainted, pending, hazardous;

  i32 pc, next_pc;
  u32 mode;
  bool finished, at_barrier, yielded, tracing;
  u64 executed;
  u8* scratch;
  u8* scratch_undefined;
  u32 index;  // of the wave in its workgroup
  Group* group;

  // s_waitcnt: sequence numbers of issued and of surely finished operations
  u32 vm_issued, vm_done, lds_issued, lds_done, smem_issued, smem_done;
  u32 vm_done_at_barrier, last_lds_write;
  u32 pending_sequence[NUM_VGPR + NUM_SGPR];
  u8 pending_class[NUM_VGPR + NUM_SGPR];
  i32 pending_pc[NUM_VGPR + NUM_SGPR];

  // wait states
  u32 clock, hazard_until, longest_hazard;  // the last: states to look back for matrix operations
  u32 num_recent;
  Issued recent[RECENT];
  Origin origin[NUM_VGPR + NUM_SGPR];
  size_t last_range;

  u64_view& exec() { return *(u64_view*)&s[EXEC]; }
  u64_view& vcc() { return *(u64_view*)&s[VCC]; }
  u64 pair(int sgpr) const { return join(s[sgpr], s[sgpr + 1]); }
  void set_pair(int sgpr, u64 value) {
    s[sgpr] = (u32)value;
    s[sgpr + 1] = (u32)(value >> 32);
  }
  bool saturates() const { return mode >> 23 & 1; }  // MODE.FP16_OVFL
  bool gfx950() const { return group->launch->is_gfx950; }
  int fp8_flavour(bool e5m2) const { return (gfx950() ? E_OCP : 0) + (e5m2 ? 1 : 0); }
  static constexpr int E_OCP = 2;
};

inline void refresh_exec_lanes(Wave& w) {
  u64 exec = w.exec();
  if (exec == w.exec_key) return;
  w.exec_key = exec;
  FOR_LANES w.exec_lanes[lane] = exec >> lane & 1 ? ~0u : 0;
}
inline int first_active(Wave& w) { return w.exec() ? __builtin_ctzll(w.exec()) : 0; }

}  // namespace cdnasim
