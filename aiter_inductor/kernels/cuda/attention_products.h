// Products of 16-bit tiles by warpgroups, bf16 or fp16 as the build's FP16 says, and what they read.
#pragma once

#include "tma.h"
#include "wgmma.h"

template <u32 N, bool A_MN, bool B_MN>
DEVICE void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
  if (FP16)
    Wgmma<N>::template fp16<A_MN, B_MN>(d, a, b, accumulate);
  else
    Wgmma<N>::template bf16<A_MN, B_MN>(d, a, b, accumulate);
}
template <u32 N, bool B_MN>
DEVICE void multiply(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
  if (FP16)
    Wgmma<N>::template fp16<B_MN>(d, a, b, accumulate);
  else
    Wgmma<N>::template bf16<B_MN>(d, a, b, accumulate);
}

// Addresses made from `x` after this are made again in every round of a loop: kept over it, one
// descriptor for every step of a product would spill.
DEVICE void opaque(u32& x) { asm volatile("" : "+r"(x)); }

DEVICE float2 load_pair(u32 shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared) : "memory");
  return x;
}

DEVICE void load_four(u32 (&x)[4], u32 shared) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared)
               : "memory");
}
DEVICE void store_four(u32 shared, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}
