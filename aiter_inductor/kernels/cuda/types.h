// Words and conversions. Header-free, so that NVRTC builds what nvcc builds.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr u32 WARP = 32;
constexpr u32 WARPGROUP = 128;

// A tensor map by value: cuTensorMapEncodeTiled's 128 bytes, which TMA wants 64-byte aligned.
struct alignas(64) TensorMap {
  u8 bytes[128];
};

// Where `pointer` lies in the block's shared memory, as PTX takes it.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE u32 pack_fp16(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four floats to four e4m3fn, the first in the lowest byte; beyond 448 saturates.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)low | (u32)high << 16;
}

template <class T> constexpr __device__ T ceil_div(T size, T by) { return (size + by - 1) / by; }
