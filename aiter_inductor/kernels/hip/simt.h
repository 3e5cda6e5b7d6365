// One vocabulary for four targets: hip-clang without any ROCm header, nvcc or NVRTC, hiprtc, and
// g++ or clang++ on the host, where the threads of a block are fibers. Each backend header defines
//
//   SIMT_DEVICE, SIMT_KERNEL(threads), SIMT_ENTRY(kernel), SIMT_SHARED, UNROLL
//     (where registers limit how many blocks a multiprocessor of an NVIDIA chip holds, the build
//     may define how many are to fit, RESIDENT; 0 leaves it to the compiler, which with 1 spends
//     registers on loads ahead)
//   WAVE, thread_index(), block_x(), block_y(), barrier()
//   begin(addresses...)          before memory is touched: where a launch may come early, waits for
//                                the kernel before it, and lets the one behind it come early too;
//                                the addresses given, not all null, are computed by then
//   prefetch(address)            into a cache that all blocks share; may come before begin(), for
//                                what the kernel before is still to write is only read in vain
//   arrive_in_cluster<COUNT>(), wait_for_cluster<COUNT>()    before the first `share`, once a kernel
//   share<COUNT>(slot, bits)     of a whole wave: into that slot of each of a row's COUNT blocks
//   barrier_of_row<COUNT>()      for the threads of all COUNT blocks
//   atomic_max(address, bits)    unsigned
//   wave_reduce<WIDTH, Op>(bits)    over aligned groups of WIDTH lanes; every lane gets the result;
//                                   Op::KIND names operations that a chip may have an instruction for
//   WAVES_PART                   whether waves may reduce unequally often between two barriers
//   bits_of, float_of, multiply_add, inverse_sqrt, reciprocal, power_of_two, median
//   encode_bf16x2, encode_fp16x2, decode_fp16   round to nearest even
//   larger_halves(a, b)          of two unsigned 16-bit halves each
//   forget_word(bits)            the compiler no longer knows where they come from
//   BY_RECIPROCAL                whether to multiply by a scale's reciprocal when quantising
//   HAS_NATIVE_FP8<F>, native_fp8x4<F>      for flavours that the chip converts to by itself
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

enum class Fp8 { e4m3fn, e4m3fnuz };
enum class Reduction { other, largest, lowest };  // the latter of unsigned words

#if defined(__HIP__) || defined(__HIPCC_RTC__)
#include "simt_amd.h"
#elif defined(__CUDACC__)
#include "simt_nvidia.h"
#else
#include "simt_host.h"
#endif
