// Running a launch: workgroups are dealt to threads, the waves of a workgroup take turns, each
// running until it reaches a barrier, sleeps or ends.
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "lds_shadow.hpp"
#include "prepare.hpp"
#ifdef __SSE__
#include <immintrin.h>
#endif

namespace cdnasim {

// MODE.FP_DENORM for f32, bits 5:4: values below 3 flush inputs, results or both.
static void set_denormals([[maybe_unused]] u32 mode) {
#ifdef __SSE__
  u32 keep = mode >> 4 & 3, csr = _mm_getcsr() & ~0x8040u;
  if (!(keep & 1)) csr |= 0x0040;  // inputs
  if (!(keep & 2)) csr |= 0x8000;  // results
  if (csr != _mm_getcsr()) _mm_setcsr(csr);
#endif
}

static void trace_before(Wave& w, const Ins& I) {
  if (w.group->trace->size() < w.group->launch->trace_capacity)
    w.group->trace->push_back({I.pc, 0, w.exec(), {}});
}
static void trace_after(Wave& w, const Ins& I, size_t at) {
  if (at >= w.group->trace->size()) return;
  TraceEntry& entry = (*w.group->trace)[at];
  entry.scc = w.s[SCC];
  if (!I.num_dst) return;
  const Arg& d = I.args[0];
  FOR_LANES entry.first[lane] = d.kind == ARG_VGPR   ? w.v[d.index][lane]
                                : d.kind == ARG_SGPR ? w.s[d.index]
                                                     : 0;
}

// Execute one wave until it stops being runnable.
static void run_wave(Wave& w, const std::vector<Ins>& code) {
  const Launch& launch = *w.group->launch;
  bool waits = launch.checks & CHECK_WAITS, states = launch.checks & CHECK_WAIT_STATES;
  u64* counts = w.group->counts->data();
  w.yielded = false;
  u32 mode = w.mode;
  set_denormals(mode);
  while (!w.finished && !w.at_barrier && !w.yielded) {
    const Ins& I = code[w.pc];
    counts[w.pc]++;
    if ((I.always_checked && states) || w.attention.meets(I.touched)) check_instruction(w, I);
    w.next_pc = w.pc + 1;
    size_t traced = w.tracing ? w.group->trace->size() : 0;
    if (w.tracing) trace_before(w, I);
    if (I.is_memory && waits) issue(w, I);
    u32 issued_at = w.clock;
    I.run(w, I);
    if (w.tracing) trace_after(w, I, traced);
    if (states) {
      u32 nops = w.clock - issued_at;
      w.clock = issued_at;
      note_wait_states(w, I);
      w.clock += nops + 1;
    }
    w.pc = w.next_pc;
    if (w.mode != mode) set_denormals(mode = w.mode);
    if (++w.executed > launch.max_instructions) {
      report(w, I, STUCK, -1, -1, "still running after %llu instructions",
             (unsigned long long)launch.max_instructions);
      throw Stop{};
    }
  }
}

// ---- initial state of a wave
static void poison_registers(Wave& w, const Launch& launch) {
  bool undefined = launch.checks & CHECK_UNDEFINED;
  auto poison = [&](int first, int count) {
    memset(w.v[first], 0xcd, (size_t)count * sizeof w.v[0]);
    memset(w.undefined[first], undefined ? 0xff : 0, (size_t)count * sizeof w.v[0]);
    for (int r = first; r < first + count; r++) {
      w.origin[r] = {-1, r};
      if (undefined) w.tainted.add(r);
    }
  };
  poison(0, launch.num_vgprs);
  poison(256, launch.num_agprs);
  for (int s = 0; s < NUM_SGPR; s++) {
    w.s[s] = POISON;
    w.s_undefined[s] = undefined ? ~0u : 0;
    w.origin[scalar_bit(s)] = {-1, scalar_bit(s)};
    if (undefined) w.tainted.add(scalar_bit(s));
  }
}
static void define(Wave& w, int sgpr, u32 value) {
  w.s[sgpr] = value;
  w.s_undefined[sgpr] = 0;
  w.tainted.remove(scalar_bit(sgpr));
}
static void define_pair(Wave& w, int sgpr, u64 value) {
  define(w, sgpr, (u32)value);
  define(w, sgpr + 1, (u32)(value >> 32));
}
static void start_wave(Wave& w, Group& group, u32 index) {
  const Launch& L = *group.launch;
  memset((void*)&w.exec_key, 0, sizeof(Wave) - offsetof(Wave, exec_key));
  w.exec_key = 0;
  memset(w.exec_lanes, 0, sizeof w.exec_lanes);
  w.index = index;
  w.group = &group;
  w.pc = L.entry;
  w.mode = (u32)L.float_mode;
  poison_registers(w, L);
  int threads = L.block[0] * L.block[1] * L.block[2], mine = threads - 64 * (int)index;
  define_pair(w, EXEC, mine >= 64 ? ~0ull : (1ull << mine) - 1);
  define(w, SCC, 0);
  define_pair(w, VCC, 0);
  define(w, M0, 0);
  define_pair(w, FLAT_SCRATCH, L.flat_scratch);
  if (L.dispatch_ptr_sgpr >= 0) define_pair(w, L.dispatch_ptr_sgpr, L.dispatch_packet);
  if (L.kernarg_sgpr >= 0) define_pair(w, L.kernarg_sgpr, L.kernarg);
  for (int i = 0; i < L.preload_dwords; i++)
    define(w, L.preload_sgpr + i, ((const u32*)L.kernarg)[L.preload_offset + i]);
  int next = L.user_sgprs;
  for (int axis = 0; axis < 3; axis++)
    if (L.group_id_enable[axis]) define(w, next++, (u32)group.id[axis]);
  FOR_LANES {
    int t = 64 * (int)index + lane;
    int x = t % L.block[0], y = t / L.block[0] % L.block[1], z = t / L.block[0] / L.block[1];
    w.v[0][lane] = (u32)(x | y << 10 | z << 20);
    w.undefined[0][lane] = 0;
  }
  w.tainted.remove(0);
  refresh_attention(w);
}

// ---- one worker thread: its own waves, LDS and scratch, reused from workgroup to workgroup
struct Worker {
  const Program& program;
  const Launch& launch;
  Group group;
  std::vector<u8> lds, scratch, scratch_undefined;
  LdsShadow shadow;
  std::vector<Finding> findings;
  std::vector<u64> counts;
  std::vector<TraceEntry> trace;
  std::vector<std::unique_ptr<Wave>> waves;
  u64 executed = 0;

  Worker(const Program& program, const Launch& launch, const std::vector<Range>& ranges)
      : program(program),
        launch(launch),
        lds(launch.lds_bytes + 64),
        shadow(launch.lds_bytes),
        counts(program.code.size()) {
    int num_waves = (launch.block[0] * launch.block[1] * launch.block[2] + 63) / 64;
    scratch.resize((size_t)launch.scratch_bytes * 64 * num_waves + 64);
    scratch_undefined.resize(scratch.size());
    group = {lds.data(), &shadow, &launch, &ranges, &findings,
             &counts,    &trace,  {},      {},      FIRST_EPOCH};
    for (int i = 0; i < num_waves; i++) {
      waves.push_back(std::make_unique<Wave>());
      group.waves.push_back(waves.back().get());
    }
  }

  void run(u64 number) {
    group.id[0] = (i32)(number % launch.grid[0]);
    group.id[1] = (i32)(number / launch.grid[0] % launch.grid[1]);
    group.id[2] = (i32)(number / launch.grid[0] / launch.grid[1]);
    std::fill(lds.begin(), lds.end(), 0xcd);
    shadow.reset();
    group.epoch = FIRST_EPOCH;
    std::fill(scratch.begin(), scratch.end(), 0xcd);
    std::fill(scratch_undefined.begin(), scratch_undefined.end(),
              (launch.checks & CHECK_UNDEFINED) ? 1 : 0);
    bool traced = launch.trace_capacity && !memcmp(group.id, launch.trace_group, sizeof group.id);
    for (size_t i = 0; i < waves.size(); i++) {
      start_wave(*waves[i], group, (u32)i);
      waves[i]->scratch = scratch.data() + (size_t)launch.scratch_bytes * 64 * i;
      waves[i]->scratch_undefined =
          scratch_undefined.data() + (size_t)launch.scratch_bytes * 64 * i;
      waves[i]->tracing = traced && (int)i == launch.trace_wave;
    }
    try {
      take_turns();
    } catch (const Stop&) {
    }
    for (auto& w : waves) executed += w->executed;
  }

  void take_turns() {
    for (;;) {
      bool ran = false, waiting = false;
      for (auto& w : waves) {
        if (w->finished) continue;
        waiting = true;
        if (w->at_barrier) continue;
        run_wave(*w, program.code);
        ran = true;
      }
      if (!waiting) return;
      if (ran) continue;
      group.epoch = shadow.next_epoch(group.epoch);
      for (auto& w : waves) w->at_barrier = false;
    }
  }
};

static void merge_findings(std::vector<Finding>& into, const std::vector<Finding>& from) {
  for (const Finding& f : from) {
    bool known = false;
    for (Finding& g : into)
      if (g.kind == f.kind && g.pc == f.pc) g.occurrences += f.occurrences, known = true;
    if (!known) into.push_back(f);
  }
}

struct Outcome {
  u64 instructions;
  std::vector<Finding> findings;
  std::vector<u64> counts;
  std::vector<TraceEntry> trace;
};

std::unique_ptr<Outcome> run_launch(const Program& program, const Launch& launch,
                                    const std::vector<Range>& ranges) {
  u64 total = (u64)launch.grid[0] * launch.grid[1] * launch.grid[2];
  std::atomic<u64> next{0};
  std::mutex merging;
  auto outcome = std::make_unique<Outcome>();
  outcome->instructions = 0;
  outcome->counts.resize(program.code.size());
  auto work = [&] {
    auto worker = std::make_unique<Worker>(program, launch, ranges);
    for (u64 number; (number = next++) < total;) worker->run(number);
    std::lock_guard<std::mutex> lock(merging);
    outcome->instructions += worker->executed;
    merge_findings(outcome->findings, worker->findings);
    for (size_t i = 0; i < worker->counts.size(); i++) outcome->counts[i] += worker->counts[i];
    if (!worker->trace.empty()) outcome->trace = std::move(worker->trace);
  };
  u64 threads = (u64)launch.num_threads < total ? (u64)launch.num_threads : total;
  std::vector<std::thread> pool;
  for (u64 i = 1; i < threads; i++) pool.emplace_back(work);
#ifdef __SSE__
  u32 csr = _mm_getcsr();
  if (total) work();
  _mm_setcsr(csr);
#else
  if (total) work();
#endif
  for (std::thread& t : pool) t.join();
  return outcome;
}

}  // namespace cdnasim

// ---- the C interface that native.py calls
using namespace cdnasim;

extern "C" {
int cdnasim_record_size() { return sizeof(Record); }
int cdnasim_launch_size() { return sizeof(Launch); }
int cdnasim_finding_size() { return sizeof(Finding); }
int cdnasim_trace_size() { return sizeof(TraceEntry); }
int cdnasim_op_count() { return op_count(); }
const char* cdnasim_op_name(int index) { return op_at(index).name.c_str(); }
u64 cdnasim_op_flags(int index) { return op_at(index).flags; }
int cdnasim_op_passes(int index) { return op_at(index).passes; }
int cdnasim_op_access_bytes(int index) {
  const Shape& s = op_at(index).shape;
  return s.dwords ? 4 * s.dwords : s.bytes;
}

void* cdnasim_prepare(const Record* records, int count) {
  return prepare(records, count).release();
}
// Why instruction `pc` cannot be executed, or null.
const char* cdnasim_unsupported(void* program, int pc) {
  return ((Program*)program)->code[pc].reason;
}
void cdnasim_free_program(void* program) { delete (Program*)program; }

void* cdnasim_run(void* program, const Launch* launch, const Range* ranges) {
  std::vector<Range> sorted(ranges, ranges + launch->num_ranges);
  return run_launch(*(Program*)program, *launch, sorted).release();
}
u64 cdnasim_instructions(void* outcome) { return ((Outcome*)outcome)->instructions; }
int cdnasim_num_findings(void* outcome) { return (int)((Outcome*)outcome)->findings.size(); }
const Finding* cdnasim_findings(void* outcome) { return ((Outcome*)outcome)->findings.data(); }
const u64* cdnasim_counts(void* outcome) { return ((Outcome*)outcome)->counts.data(); }
int cdnasim_num_trace(void* outcome) { return (int)((Outcome*)outcome)->trace.size(); }
const TraceEntry* cdnasim_trace(void* outcome) { return ((Outcome*)outcome)->trace.data(); }
void cdnasim_free_outcome(void* outcome) { delete (Outcome*)outcome; }
}
