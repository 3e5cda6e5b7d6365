// What the fp8 products share: scales, results, the order of tiles, and the ring of stages.
#pragma once

#include "barrier.h"
#include "tma.h"
#include "wgmma.h"

constexpr u32 BLOCK_K = 128;  // bytes of K a stage, one swizzle atom and one group of scales

enum class Scaling { block, row, tensor };
enum class Number { none, bf16, fp16, fp32 };

// Zero where it is not there. Volatile, so that a load ahead of its use stays ahead. Not by the path of
// constants: while this kernel waits for the one ahead, that one may write the scale.
DEVICE float load_scale(const float* from, bool there) {
  float x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
      "mov.f32 %0, 0f00000000;\n@p ld.global.f32 %0, [%1];\n}\n"
      : "=f"(x)
      : "l"(from), "r"((u32)there));
  return x;
}

template <Number KIND> DEVICE float load_number(const void* from, i64 index) {
  if constexpr (KIND == Number::fp32) return ((const float*)from)[index];
  if constexpr (KIND == Number::bf16)
    return __uint_as_float((u32)((const u16*)from)[index] << 16);
  if constexpr (KIND == Number::fp16) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(((const u16*)from)[index]));
    return x;
  }
  return 0.0f;
}

template <Number KIND> DEVICE u32 pack_pair(float low, float high) {
  return KIND == Number::fp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

template <Number KIND> DEVICE void store_number(void* to, i64 index, float x) {
  if constexpr (KIND == Number::fp32)
    ((float*)to)[index] = x;
  else
    ((u16*)to)[index] = (u16)pack_pair<KIND>(x, 0.0f);
}

// A stage of the ring and the parity of its current round.
struct Ring {
  u32 stage = 0, parity = 0;
  template <u32 STAGES> __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Tile {
  u32 m, n;
};

// Tiles in bands of `band` along M, down each band's columns first: what runs at one time then
// shares rows of both operands in the L2.
DEVICE Tile tile_at(u32 index, u32 tiles_m, u32 tiles_n, u32 band) {
  const u32 per_band = band * tiles_n, first = index / per_band * band;
  const u32 height = min(band, tiles_m - first), within = index % per_band;
  return {first + within % height, within / height};
}
