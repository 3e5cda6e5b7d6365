// simt.h for the host: the threads of a block are fibers that switch at barriers and reductions,
// so a kernel can be debugged with gdb and printf and compared with a float64 reference anywhere.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define SIMT_DEVICE static inline
#define SIMT_KERNEL(threads) static void
#define SIMT_SHARED static thread_local
#define UNROLL
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
#define SIMT_ENTRY(kernel) \
  SIMT_EXPORT void kernel##_entry(void** params) { simt::call(kernel, params); }

#ifndef SIMT_WAVE
#define SIMT_WAVE 64
#endif
constexpr int WAVE = SIMT_WAVE;

namespace simt {

constexpr size_t STACK_BYTES = 64 * 1024;

struct Fiber {
  ucontext_t context;
  char* stack;
  long switches;  // barriers and reductions passed; fibers that disagree mean a divergent barrier
  bool done;
  u32 offered[2];  // for reductions, by the parity of `switches`
};

struct Block {
  Fiber* fibers;
  int num_fibers, current;
  unsigned x, y;
  ucontext_t scheduler;
  void (*entry)(void** params);
  void** params;
};

inline thread_local Block* block;

inline Fiber& fiber() { return block->fibers[block->current]; }

inline void pause() {
  Fiber& self = fiber();
  self.switches++;
  swapcontext(&self.context, &block->scheduler);
}

inline void run() {
  block->entry(block->params);
  fiber().done = true;
  swapcontext(&fiber().context, &block->scheduler);
}

inline void start(Fiber& f) {
  f.switches = 0;
  f.done = false;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = STACK_BYTES;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run, 0);
}

// Runs every fiber to its next pause until all are done; false if they pause unequally often.
inline bool run_block() {
  Block& b = *block;
  for (int i = 0; i < b.num_fibers; i++) start(b.fibers[i]);
  for (;;) {
    for (b.current = 0; b.current < b.num_fibers; b.current++)
      swapcontext(&b.scheduler, &fiber().context);
    const Fiber& first = b.fibers[0];
    for (int i = 1; i < b.num_fibers; i++)
      if (b.fibers[i].done != first.done || b.fibers[i].switches != first.switches) return false;
    if (first.done) return true;
  }
}

// Braces fix the order in which `params` advances.
template <class... A> void call(void (*kernel)(A...), void** params) {
  struct Call {
    Call(void (*kernel)(A...), A... arguments) { kernel(arguments...); }
  };
  Call{kernel, *(A*)*params++...};
}

}  // namespace simt

constexpr int DIVERGENT_BARRIER = 1;
constexpr int UNSUPPORTED_SHAPE = 2;

// The parameters of cuLaunchKernel; `entry` is the address of a kernel's SIMT_ENTRY.
SIMT_EXPORT int simt_launch(void* entry, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned,
                            void*, void** params, void**) {
  if (grid_z * block_y * block_z != 1) return UNSUPPORTED_SHAPE;
  simt::Fiber* fibers = (simt::Fiber*)calloc(block_x, sizeof(simt::Fiber));
  char* stacks = (char*)malloc(block_x * simt::STACK_BYTES);
  for (unsigned i = 0; i < block_x; i++) fibers[i].stack = stacks + i * simt::STACK_BYTES;
  simt::Block block{fibers, (int)block_x, 0, 0, 0, {}, (void (*)(void**))entry, params};
  simt::block = &block;
  bool uniform = true;
  for (block.y = 0; block.y < grid_y && uniform; block.y++)
    for (block.x = 0; block.x < grid_x && uniform; block.x++) uniform = simt::run_block();
  free(stacks);
  free(fibers);
  return uniform ? 0 : DIVERGENT_BARRIER;
}

SIMT_DEVICE u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
SIMT_DEVICE float float_of(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
SIMT_DEVICE int thread_index() { return simt::block->current; }
SIMT_DEVICE int block_x() { return (int)simt::block->x; }
SIMT_DEVICE int block_y() { return (int)simt::block->y; }
template <class... T> SIMT_DEVICE void begin(const T*...) {}
SIMT_DEVICE void prefetch(const void*) {}
SIMT_DEVICE void barrier() { simt::pause(); }
// A row lies within one block here.
template <int COUNT> SIMT_DEVICE void arrive_in_cluster() {}
template <int COUNT> SIMT_DEVICE void wait_for_cluster() {}
template <int COUNT> SIMT_DEVICE void share(u32* slot, u32 x) {
  static_assert(COUNT == 1, "no clusters");
  if (thread_index() % WAVE == 0) *slot = x;
}
template <int COUNT> SIMT_DEVICE void barrier_of_row() { barrier(); }

SIMT_DEVICE void atomic_max(u32* address, u32 x) {  // the fibers share one thread
  if (*address < x) *address = x;
}

template <int WIDTH, class Op> SIMT_DEVICE u32 wave_reduce(u32 x) {
  static_assert(WIDTH <= WAVE && (WIDTH & (WIDTH - 1)) == 0, "a power of two within a wave");
  if (WIDTH == 1) return x;
  const int parity = simt::fiber().switches & 1, first = thread_index() & -WIDTH;
  simt::fiber().offered[parity] = x;
  simt::pause();
  u32 values[WIDTH];
  for (int i = 0; i < WIDTH; i++) values[i] = simt::block->fibers[first + i].offered[parity];
  for (int left = WIDTH / 2; left; left /= 2)
    for (int i = 0; i < left; i++) values[i] = Op::of(values[i], values[i + left]);
  return values[0];
}

SIMT_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_DEVICE float inverse_sqrt(float x) { return 1.0f / sqrtf(x); }
SIMT_DEVICE float reciprocal(float x) { return 1.0f / x; }
SIMT_DEVICE float power_of_two(float x) { return exp2f(x); }
SIMT_DEVICE float median(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

SIMT_DEVICE u32 encode_bf16(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
SIMT_DEVICE u32 encode_bf16x2(float low, float high) {
  return encode_bf16(low) | encode_bf16(high) << 16;
}
SIMT_DEVICE u32 encode_fp16(float x) {
  const _Float16 half = (_Float16)x;
  u16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
SIMT_DEVICE u32 encode_fp16x2(float low, float high) {
  return encode_fp16(low) | encode_fp16(high) << 16;
}
SIMT_DEVICE float decode_fp16(u32 bits) {
  const u16 low = (u16)bits;
  _Float16 half;
  memcpy(&half, &low, 2);
  return (float)half;
}

template <Fp8 F> constexpr bool HAS_NATIVE_FP8 = false;
template <Fp8 F> SIMT_DEVICE u32 native_fp8x4(float, float, float, float) { return 0; }

SIMT_DEVICE void forget_word(u32&) {}
SIMT_DEVICE u32 larger_halves(u32 a, u32 b) {
  const u32 low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  return low | ((a >> 16) > (b >> 16) ? a & 0xffff0000 : b & 0xffff0000);
}

constexpr bool WAVES_PART = false;
constexpr bool BY_RECIPROCAL = false;
