// s_waitcnt. vmcnt counts vector memory operations, which finish in order; lgkmcnt counts LDS
// operations, in order among themselves, and scalar loads, in any order. A register that an
// outstanding load will write may not be touched, except as destination of a later load of the
// same in-order class (two d16 loads that fill the halves of one register).
#include "checks.hpp"

namespace cdnasim {

constexpr u32 MOST_VM = 63, MOST_LGKM = 15;  // what the 6-bit and 4-bit counters can hold

static bool finished(const Wave& w, int bit) {
  u32 sequence = w.pending_sequence[bit];
  switch (w.pending_class[bit]) {
    case WAIT_VM: return sequence <= w.vm_done;
    case WAIT_LDS: return sequence <= w.lds_done;
    default: return sequence <= w.smem_done;
  }
}
static int wait_class(const Ins& I) {
  return I.flags & VMEM ? WAIT_VM : I.flags & LDS ? WAIT_LDS : WAIT_SMEM;
}

void check_pending(Wave& w, const Ins& I) {
  for (int word = 0; word < 10; word++)
    for (u64 left = w.pending.word[word] & I.touched.word[word]; left; left &= left - 1) {
      int bit = 64 * word + __builtin_ctzll(left);
      if (finished(w, bit)) {
        w.pending.remove(bit);
        continue;
      }
      bool only_loads_into =
          (I.flags & LOADS) && (I.flags & (VMEM | LDS)) && wait_class(I) == w.pending_class[bit];
      for (int k = I.num_dst; k < I.nargs && only_loads_into; k++) {
        const Arg& a = I.args[k];
        int first = a.kind == ARG_SGPR ? scalar_bit(a.index) : a.index;
        bool names =
            (a.kind == ARG_VGPR || a.kind == ARG_SGPR) && bit >= first && bit < first + a.count;
        only_loads_into = !names;
      }
      if (only_loads_into) continue;
      static const char* const counter[] = {"vmcnt", "lgkmcnt", "lgkmcnt(0)"};
      report(w, I, MISSING_WAIT, -1, w.pending_pc[bit],
             "uses %s while a load into it is outstanding (needs s_waitcnt %s)",
             register_name(bit).c_str(), counter[w.pending_class[bit]]);
      w.pending.remove(bit);
    }
}

static void mark(Wave& w, const Ins& I, int bit, int wait, u32 sequence) {
  w.pending_sequence[bit] = sequence;
  w.pending_class[bit] = (u8)wait;
  w.pending_pc[bit] = I.pc;
  w.pending.add(bit);
  w.attention.add(bit);
}

void issue(Wave& w, const Ins& I) {
  int wait = wait_class(I);
  u32 sequence = wait == WAIT_VM    ? ++w.vm_issued
                 : wait == WAIT_LDS ? ++w.lds_issued
                                    : ++w.smem_issued;
  if (wait == WAIT_LDS && (I.flags & STORES)) w.last_lds_write = sequence;
  // A full counter holds back the next operation: the oldest are done, as compilers know.
  if (w.vm_issued - w.vm_done > MOST_VM) w.vm_done = w.vm_issued - MOST_VM;
  if (w.lds_issued - w.lds_done > MOST_LGKM) w.lds_done = w.lds_issued - MOST_LGKM;
  for (int k = 0; k < I.num_dst; k++) {
    const Arg& a = I.args[k];
    int first = a.kind == ARG_SGPR ? scalar_bit(a.index) : a.index;
    for (int d = 0; d < a.count; d++) mark(w, I, first + d, wait, sequence);
  }
}

// Negative counts mean that the counter is not waited for. With scalar loads outstanding a count
// above zero still bounds the LDS operations, but says nothing of the scalar loads.
void wait_for(Wave& w, int vmcnt, int lgkmcnt) {
  if (vmcnt >= 0 && w.vm_issued > (u32)vmcnt && w.vm_issued - vmcnt > w.vm_done)
    w.vm_done = w.vm_issued - vmcnt;
  if (lgkmcnt < 0) return;
  if (w.lds_issued > (u32)lgkmcnt && w.lds_issued - lgkmcnt > w.lds_done)
    w.lds_done = w.lds_issued - lgkmcnt;
  if (lgkmcnt == 0) w.smem_done = w.smem_issued;
}

void check_barrier(Wave& w, const Ins& I) {
  if (!(w.group->launch->checks & CHECK_WAITS) || w.group->waves.size() < 2) return;
  if (w.last_lds_write > w.lds_done)
    report(w, I, MISSING_WAIT, -1, -1,
           "reaches the barrier with an LDS write outstanding (needs s_waitcnt lgkmcnt(0) first)");
}

}  // namespace cdnasim
