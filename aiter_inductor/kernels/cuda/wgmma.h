// Warpgroup matrix products: d[64 x N] += a[64 x k] b[N x k]^T, accumulated in fp32 registers.
// PTX ISA, "wgmma.mma_async" and "Shared Memory Matrix Layout".
//
// Lane l of warp w holds, in d[4 j + 2 h + i], row 16 w + 8 h + l / 4, column 8 j + 2 (l % 4) + i.
#pragma once

#include "types.h"

// Registers of the accumulators are handed over here before the first product of a group.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING committed groups are under way.
template <u32 PENDING> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of accumulators across this point.
template <u32 COUNT> DEVICE void keep(float (&d)[COUNT]) {
  UNROLL for (u32 i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- operands in shared memory, 128-byte swizzle: atoms of 8 rows x 128 bytes, 1024-aligned

// K is contiguous: rows of 128 bytes (128 e4m3, 64 bf16) of K, 8-row atoms one after the other.
// The next k step lies `descriptor + (bytes >> 4)` further: 2 for 32 e4m3 or 16 bf16.
DEVICE u64 k_major_descriptor(u32 shared) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, STRIDE = 1024ull >> 4;
  return SWIZZLE_128 | STRIDE << 32 | 1ull << 16 | (u64)((shared & 0x3ffff) >> 4);
}

// M or N is contiguous (16-bit elements only): each row is one k, holding 64 elements; a tile wider
// than 64 is several such columns, `column_bytes` apart (rows * 128 for a TMA box of 64 x rows).
// The next k step of 16 rows lies `descriptor + (2048 >> 4)` further.
DEVICE u64 mn_major_descriptor(u32 shared, u32 column_bytes) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, STRIDE = 1024ull >> 4;
  return SWIZZLE_128 | STRIDE << 32 | (u64)(column_bytes >> 4) << 16 |
         (u64)((shared & 0x3ffff) >> 4);
}

// K is contiguous, no swizzle: matrices of 8 rows x 16 bytes, each one contiguous, `k_bytes` to the
// next 16 bytes of K and `row_bytes` to the next 8 rows.
DEVICE u64 core_matrices_descriptor(u32 shared, u32 k_bytes, u32 row_bytes) {
  return (u64)(row_bytes >> 4) << 32 | (u64)(k_bytes >> 4) << 16 | (u64)((shared & 0x3ffff) >> 4);
}

// ---- one instruction a width; `accumulate` false starts from zero.

// Wgmma<N>::e4m3(d, a, b, accumulate): 32 of K; both operands from shared memory, K-major.
// Wgmma<N>::bf16<A_MN, B_MN>(d, a, b, accumulate): 16 of K; an operand is MN-major where asked.
// Wgmma<N>::bf16<B_MN>(d, a[4], b, accumulate): a from registers, laid out as d is, in pairs:
//   a[0..3] = (d0, d1), (d2, d3), (d4, d5), (d6, d7) of the 16 columns.
// Wgmma<N>::fp16, the same of fp16.
template <u32 N> struct Wgmma;

#define PREDICATE(I) "{\n.reg .pred p;\nsetp.ne.b32 p, %" #I ", 0;\n"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LIST_4 "%0, %1, %2, %3"
#define LIST_8 LIST_4 ", %4, %5, %6, %7"
#define LIST_12 LIST_8 ", %8, %9, %10, %11"
#define LIST_16 LIST_12 ", %12, %13, %14, %15"
#define LIST_20 LIST_16 ", %16, %17, %18, %19"
#define LIST_24 LIST_20 ", %20, %21, %22, %23"
#define LIST_28 LIST_24 ", %24, %25, %26, %27"
#define LIST_32 LIST_28 ", %28, %29, %30, %31"
#define LIST_36 LIST_32 ", %32, %33, %34, %35"
#define LIST_40 LIST_36 ", %36, %37, %38, %39"
#define LIST_44 LIST_40 ", %40, %41, %42, %43"
#define LIST_48 LIST_44 ", %44, %45, %46, %47"
#define LIST_52 LIST_48 ", %48, %49, %50, %51"
#define LIST_56 LIST_52 ", %52, %53, %54, %55"
#define LIST_60 LIST_56 ", %56, %57, %58, %59"
#define LIST_64 LIST_60 ", %60, %61, %62, %63"
#define LIST_68 LIST_64 ", %64, %65, %66, %67"
#define LIST_72 LIST_68 ", %68, %69, %70, %71"
#define LIST_76 LIST_72 ", %72, %73, %74, %75"
#define LIST_80 LIST_76 ", %76, %77, %78, %79"
#define LIST_84 LIST_80 ", %80, %81, %82, %83"
#define LIST_88 LIST_84 ", %84, %85, %86, %87"
#define LIST_92 LIST_88 ", %88, %89, %90, %91"
#define LIST_96 LIST_92 ", %92, %93, %94, %95"
#define LIST_100 LIST_96 ", %96, %97, %98, %99"
#define LIST_104 LIST_100 ", %100, %101, %102, %103"
#define LIST_108 LIST_104 ", %104, %105, %106, %107"
#define LIST_112 LIST_108 ", %108, %109, %110, %111"
#define LIST_116 LIST_112 ", %112, %113, %114, %115"
#define LIST_120 LIST_116 ", %116, %117, %118, %119"
#define LIST_124 LIST_120 ", %120, %121, %122, %123"
#define LIST_128 LIST_124 ", %124, %125, %126, %127"
#define BOUND_4 D4(0)
#define BOUND_8 BOUND_4, D4(4)
#define BOUND_12 BOUND_8, D4(8)
#define BOUND_16 BOUND_12, D4(12)
#define BOUND_20 BOUND_16, D4(16)
#define BOUND_24 BOUND_20, D4(20)
#define BOUND_28 BOUND_24, D4(24)
#define BOUND_32 BOUND_28, D4(28)
#define BOUND_36 BOUND_32, D4(32)
#define BOUND_40 BOUND_36, D4(36)
#define BOUND_44 BOUND_40, D4(40)
#define BOUND_48 BOUND_44, D4(44)
#define BOUND_52 BOUND_48, D4(48)
#define BOUND_56 BOUND_52, D4(52)
#define BOUND_60 BOUND_56, D4(56)
#define BOUND_64 BOUND_60, D4(60)
#define BOUND_68 BOUND_64, D4(64)
#define BOUND_72 BOUND_68, D4(68)
#define BOUND_76 BOUND_72, D4(72)
#define BOUND_80 BOUND_76, D4(76)
#define BOUND_84 BOUND_80, D4(80)
#define BOUND_88 BOUND_84, D4(84)
#define BOUND_92 BOUND_88, D4(88)
#define BOUND_96 BOUND_92, D4(92)
#define BOUND_100 BOUND_96, D4(96)
#define BOUND_104 BOUND_100, D4(100)
#define BOUND_108 BOUND_104, D4(104)
#define BOUND_112 BOUND_108, D4(108)
#define BOUND_116 BOUND_112, D4(112)
#define BOUND_120 BOUND_116, D4(116)
#define BOUND_124 BOUND_120, D4(120)
#define BOUND_128 BOUND_124, D4(124)

// The accumulators are operands %0 to %(R-1), the others the numbers that follow.
#define WGMMA_16(NAME, TYPE, N, R, I1, I2, I3, I4, I5, I6)                                         \
  template <bool A_MN, bool B_MN>                                                                  \
  static __device__ __forceinline__ void NAME(float (&d)[R], u64 a, u64 b, u32 accumulate) {       \
    asm volatile(PREDICATE(I2) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE     \
                 " {" LIST_##R "}, %" #R ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}\n"           \
                 : BOUND_##R                                                                       \
                 : "l"(a), "l"(b), "r"(accumulate), "n"((int)A_MN), "n"((int)B_MN));               \
  }                                                                                                \
  template <bool B_MN>                                                                             \
  static __device__ __forceinline__ void NAME(float (&d)[R], const u32 (&a)[4], u64 b,             \
                                              u32 accumulate) {                                    \
    asm volatile(PREDICATE(I5) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE     \
                 " {" LIST_##R "}, {%" #R ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4                 \
                 ", p, 1, 1, %" #I6 ";\n}\n"                                                       \
                 : BOUND_##R                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),            \
                   "n"((int)B_MN));                                                                \
  }

#define WGMMA(N, R, I1, I2, I3, I4, I5, I6)                                                        \
  template <> struct Wgmma<N> {                                                                    \
    static __device__ __forceinline__ void e4m3(float (&d)[R], u64 a, u64 b, u32 accumulate) {     \
      asm volatile(PREDICATE(I2) "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {"      \
                   LIST_##R "}, %" #R ", %" #I1 ", p, 1, 1;\n}\n"                                  \
                   : BOUND_##R                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate));                                             \
    }                                                                                              \
    WGMMA_16(bf16, "bf16", N, R, I1, I2, I3, I4, I5, I6)                                           \
    WGMMA_16(fp16, "f16", N, R, I1, I2, I3, I4, I5, I6)                                            \
  };

WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef WGMMA
#undef WGMMA_16
