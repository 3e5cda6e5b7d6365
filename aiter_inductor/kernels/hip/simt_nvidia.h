// simt.h for sm_90 through nvcc or NVRTC.
#pragma once

#ifndef RESIDENT
#define RESIDENT 1
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif

#define SIMT_DEVICE static __device__ __forceinline__
#if RESIDENT
#define SIMT_BOUNDS(threads) __launch_bounds__(threads, RESIDENT)
#else
#define SIMT_BOUNDS(threads) __launch_bounds__(threads)
#endif
#if BLOCKS > 1
#define SIMT_KERNEL(threads) \
  extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) SIMT_BOUNDS(threads)
#else
#define SIMT_KERNEL(threads) extern "C" __global__ void SIMT_BOUNDS(threads)
#endif
#define SIMT_ENTRY(kernel)
#define SIMT_SHARED __shared__
#define UNROLL _Pragma("unroll")

constexpr int WAVE = 32;

SIMT_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
SIMT_DEVICE float float_of(u32 x) { return __uint_as_float(x); }
SIMT_DEVICE int thread_index() { return threadIdx.x; }
SIMT_DEVICE int block_x() { return blockIdx.x; }
SIMT_DEVICE int block_y() { return blockIdx.y; }
// ptxas moves arithmetic and the reading of parameters behind a wait, but not behind a branch that
// depends on them: RMSNorm of 1 x 4096 takes an H100 1.03 us with this one and 1.28 without, SiLU * up
// of 64 x 14336 2.97 and 3.13. Addresses are not null, so nothing exits.
SIMT_DEVICE void know(u64 addresses) {
  asm volatile(
      "{\n.reg .pred none;\n"
      "setp.eq.u64 none, %0, 0;\n"
      "@none exit;\n}\n" ::"l"(addresses));
}
// PTX ISA, "griddepcontrol": until all before it in the stream is complete and visible.
template <class... T> SIMT_DEVICE void begin(const T*... addresses) {
  if constexpr (sizeof...(T) > 0) know((... | (u64)addresses));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
SIMT_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
SIMT_DEVICE void barrier() { __syncthreads(); }

// Shared memory of another block may be written once that block has begun.
template <int COUNT> SIMT_DEVICE void arrive_in_cluster() {
  if constexpr (COUNT > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
template <int COUNT> SIMT_DEVICE void wait_for_cluster() {
  if constexpr (COUNT > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
template <int COUNT> SIMT_DEVICE void share(u32* slot, u32 x) {
  const u32 lane = threadIdx.x % WAVE;
  if constexpr (COUNT == 1) {
    if (lane == 0) *slot = x;
  } else if (lane < COUNT) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.u32 [there], %2;\n}\n" ::"r"((u32)__cvta_generic_to_shared(slot)),
        "r"(lane), "r"(x)
        : "memory");
  }
}
template <int COUNT> SIMT_DEVICE void barrier_of_row() {
  if constexpr (COUNT == 1) {
    __syncthreads();
  } else {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}

SIMT_DEVICE void atomic_max(u32* address, u32 x) { atomicMax(address, x); }

template <int WIDTH, class Op> SIMT_DEVICE u32 wave_reduce(u32 x) {
  static_assert(WIDTH <= WAVE && (WIDTH & (WIDTH - 1)) == 0, "a power of two within a wave");
  if constexpr (WIDTH == WAVE && Op::KIND == Reduction::largest) return __reduce_max_sync(~0u, x);
  if constexpr (WIDTH == WAVE && Op::KIND == Reduction::lowest) return __reduce_min_sync(~0u, x);
  UNROLL for (int step = 1; step < WIDTH; step *= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

SIMT_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SIMT_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }
// One instruction each, within 2 units in the last place; what is not normal is 0.
SIMT_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float median(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

SIMT_DEVICE u32 encode_bf16x2(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
SIMT_DEVICE u32 encode_fp16x2(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
SIMT_DEVICE float decode_fp16(u32 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
  return x;
}

template <Fp8 F> constexpr bool HAS_NATIVE_FP8 = F == Fp8::e4m3fn;

template <Fp8 F> SIMT_DEVICE u32 native_fp8x4(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)low | (u32)high << 16;
}

SIMT_DEVICE void forget_word(u32& word) { asm volatile("" : "+r"(word)); }
SIMT_DEVICE u32 larger_halves(u32 a, u32 b) { return __vmaxu2(a, b); }

constexpr bool WAVES_PART = true;

// A product with the reciprocal rounds a tie the other way once in thousands of elements; exact
// quotients cost a fifth of the instructions of kernels that have none to spare.
constexpr bool BY_RECIPROCAL = true;
