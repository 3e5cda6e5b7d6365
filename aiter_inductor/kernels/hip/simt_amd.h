// simt.h for gfx942 and gfx950: compiler builtins only. hiprtc predefines some of the attributes.
#pragma once

#ifndef __device__
#define __device__ __attribute__((device))
#endif
#ifndef __global__
#define __global__ __attribute__((global))
#endif
#ifndef __shared__
#define __shared__ __attribute__((shared))
#endif
#define SIMT_DEVICE static __device__ inline __attribute__((always_inline))
#define SIMT_KERNEL(threads) \
  extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(threads, threads))) void
#define SIMT_ENTRY(kernel)
#define SIMT_SHARED __shared__
#define UNROLL _Pragma("unroll")

constexpr int WAVE = 64;

SIMT_DEVICE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
SIMT_DEVICE float float_of(u32 x) { return __builtin_bit_cast(float, x); }
SIMT_DEVICE int thread_index() { return __builtin_amdgcn_workitem_id_x(); }
SIMT_DEVICE int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
SIMT_DEVICE int block_y() { return __builtin_amdgcn_workgroup_id_y(); }

template <class... T> SIMT_DEVICE void begin(const T*...) {}
SIMT_DEVICE void prefetch(const void*) {}
SIMT_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// A row lies within one block here.
template <int COUNT> SIMT_DEVICE void arrive_in_cluster() {}
template <int COUNT> SIMT_DEVICE void wait_for_cluster() {}
template <int COUNT> SIMT_DEVICE void share(u32* slot, u32 x) {
  static_assert(COUNT == 1, "no clusters");
  if (thread_index() % WAVE == 0) *slot = x;
}
template <int COUNT> SIMT_DEVICE void barrier_of_row() { barrier(); }

SIMT_DEVICE void atomic_max(u32* address, u32 x) {
  __hip_atomic_fetch_max(address, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// Data-parallel primitives: a vector instruction reads another lane of its row of 16 for free.
enum Dpp { QUAD_SWAP_1 = 0xB1, QUAD_SWAP_2 = 0x4E, ROW_HALF_MIRROR = 0x141, ROW_MIRROR = 0x140 };

template <int CONTROL> SIMT_DEVICE u32 dpp(u32 x) {
  return (u32)__builtin_amdgcn_update_dpp(0, (int)x, CONTROL, 0xf, 0xf, true);
}

// ds_swizzle in bit mode: lane ^ 16 within each half of the wave; uses no LDS memory.
SIMT_DEVICE u32 swap_16(u32 x) { return (u32)__builtin_amdgcn_ds_swizzle((int)x, 0x401F); }

SIMT_DEVICE u32 lane_value(u32 x, int lane) {
  return (u32)__builtin_amdgcn_readlane((int)x, lane);
}

template <int WIDTH, class Op> SIMT_DEVICE u32 wave_reduce(u32 x) {
  static_assert(WIDTH <= WAVE && (WIDTH & (WIDTH - 1)) == 0, "a power of two within a wave");
  if constexpr (WIDTH > 1) x = Op::of(x, dpp<QUAD_SWAP_1>(x));
  if constexpr (WIDTH > 2) x = Op::of(x, dpp<QUAD_SWAP_2>(x));
  if constexpr (WIDTH > 4) x = Op::of(x, dpp<ROW_HALF_MIRROR>(x));
  if constexpr (WIDTH > 8) x = Op::of(x, dpp<ROW_MIRROR>(x));
  if constexpr (WIDTH == 32) x = Op::of(x, swap_16(x));
  if constexpr (WIDTH == 64) {
    const u32 low = Op::of(lane_value(x, 0), lane_value(x, 16));
    x = Op::of(low, Op::of(lane_value(x, 32), lane_value(x, 48)));
  }
  return x;
}

SIMT_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SIMT_DEVICE float inverse_sqrt(float x) { return __builtin_amdgcn_rsqf(x); }
SIMT_DEVICE float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }
SIMT_DEVICE float power_of_two(float x) { return __builtin_amdgcn_exp2f(x); }
SIMT_DEVICE float median(float x, float low, float high) {
  return __builtin_amdgcn_fmed3f(x, low, high);
}

typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
typedef _Float16 fp16x2 __attribute__((ext_vector_type(2)));

SIMT_DEVICE u32 encode_bf16x2(float low, float high) {
  return __builtin_bit_cast(u32, bf16x2{(__bf16)low, (__bf16)high});
}
SIMT_DEVICE u32 encode_fp16x2(float low, float high) {
  return __builtin_bit_cast(u32, fp16x2{(_Float16)low, (_Float16)high});
}
SIMT_DEVICE float decode_fp16(u32 bits) {
  return (float)__builtin_bit_cast(_Float16, (u16)bits);
}

#if defined(__gfx950__)
constexpr Fp8 NATIVE_FP8 = Fp8::e4m3fn;
#else
constexpr Fp8 NATIVE_FP8 = Fp8::e4m3fnuz;
#endif
template <Fp8 F> constexpr bool HAS_NATIVE_FP8 = F == NATIVE_FP8;

template <Fp8 F> SIMT_DEVICE u32 native_fp8x4(float a, float b, float c, float d) {
  const int low = __builtin_amdgcn_cvt_pk_fp8_f32(a, b, 0, false);
  return (u32)__builtin_amdgcn_cvt_pk_fp8_f32(c, d, low, true);
}

SIMT_DEVICE void forget_word(u32& word) { asm volatile("" : "+v"(word)); }

typedef u16 u16x2 __attribute__((ext_vector_type(2)));
SIMT_DEVICE u32 larger_halves(u32 a, u32 b) {
  const u16x2 x = __builtin_bit_cast(u16x2, a), y = __builtin_bit_cast(u16x2, b);
  return __builtin_bit_cast(u32, __builtin_elementwise_max(x, y));
}

constexpr bool WAVES_PART = true;
constexpr bool BY_RECIPROCAL = false;
