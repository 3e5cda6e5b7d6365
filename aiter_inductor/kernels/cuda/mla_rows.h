// From finished sums to rows of the result, or to parts of rows that mla_reduce.cu adds.
#pragma once

#include "mla_load.h"

// Finished rows of a warpgroup, half of the columns: slabs of 64 columns in the place of a tile,
// laid out as those of TMA. Those of cut sequences stay so in global memory.
constexpr u32 HALF_SLABS = SLABS / 2, HALF_BYTES = HALF_SLABS * SLAB;
static_assert(ROWS == KEYS, "a slab of rows is as large as one of keys");

// Rows of cut sequences, in fp16, each half over a power of 2, for mla_reduce: of 64 rows first the
// slabs of one half, then those of the other.
struct Sums {
  u16* rows;
  float *lse, *scales;
  // Of row `row` of this block.
  __device__ __forceinline__ u32 row(u32 slot, u32 slots, u32 row) const {
    return ((blockIdx.y * slots + slot) * BLOCKS + blockIdx.x % BLOCKS) * ROWS + row;
  }
};

struct Outputs {
  const TensorMap& rows;
  Sums sums;
  u32 slots, count;  // of parts; of rows of a sequence
};

// Which half of the columns the sums of this thread's warpgroup are.
DEVICE u32 half_of_thread() { return thread_in_block() / WARPGROUP - 1; }

// Makes fp16 of a row's half precise by `factor`, and stores by what the reduction has to multiply.
DEVICE void scale_rows(const float (&o)[128], float (&factor)[2], const Sums& sums, u32 first_row,
                       u32 half) {
  UNROLL for (u32 h = 0; h < 2; h++) {
    float highest = 0.0f;
    UNROLL for (u32 i = 0; i < 64; i++)
      highest = fmaxf(highest, fabsf(o[i / 2 * 4 + 2 * h + i % 2]));
    const float scale = scale_to_fp16(factor[h], highest);
    if (threadIdx.x % 4 == 0)
      sums.scales[(first_row + row_of_thread() + h * 8) * 2 + half] = scale;
  }
}

template <bool WHOLE_ROWS>
DEVICE void stage_rows(const float (&o)[128], const float (&factor)[2], u32 slabs) {
  const u32 thread = threadIdx.x % WARPGROUP, lane = thread % WARP, warp = thread / WARP;
  UNROLL for (u32 j = 0; j < 16; j++) {
    u32 x[4];
    UNROLL for (u32 i = 0; i < 4; i++) {
      const float a = o[8 * j + 2 * i] * factor[i % 2], b = o[8 * j + 2 * i + 1] * factor[i % 2];
      x[i] = WHOLE_ROWS ? pack_bf16(a, b) : pack_fp16(a, b);
    }
    const u32 chunk = j % 4 * 2 + lane / 16;
    stmatrix_x4(slabs + j / 4 * SLAB + swizzle_128(warp * 16 + lane % 16, chunk), x[0], x[1], x[2],
                x[3]);
  }
}

// A warpgroup's half of the rows, by way of a place in shared memory, from which one thread copies
// them; the place is free when that thread's warp says so.
DEVICE void store_rows(const float (&o)[128], u32 factors, u32 place, const Piece& piece,
                       const Outputs& outputs) {
  const u32 half = half_of_thread(), staged = place + half * HALF_BYTES;
  const u32 first_row = (blockIdx.y * BLOCKS + blockIdx.x % BLOCKS) * ROWS;
  const u32 first_sum = outputs.sums.row(piece.slot, outputs.slots, 0);
  float factor[2];
  UNROLL for (u32 h = 0; h < 2; h++)
    factor[h] = load_shared(factors + (row_of_thread() + h * 8) * 4);
  if (piece.slot == WHOLE) {
    stage_rows<true>(o, factor, staged);
  } else {
    scale_rows(o, factor, outputs.sums, first_sum, half);
    stage_rows<false>(o, factor, staged);
  }
  fence_shared();
  named_sync(2 + half, WARPGROUP);
  if (threadIdx.x % WARPGROUP != WARP) return;  // another warp than the loading thread's
  if (piece.slot == WHOLE) {
    for (u32 i = 0; i < HALF_SLABS; i++)
      tma_store_3d(outputs.rows, staged + i * SLAB, (half * HALF_SLABS + i) * 64, first_row,
                   piece.sequence);
  } else {
    const u32 count = min(outputs.count - min(first_row, outputs.count), ROWS);
    u16* const to = outputs.sums.rows + (u64)first_sum * RANK + half * (HALF_BYTES / 2);
    for (u32 i = 0; i < HALF_SLABS && count != 0; i++)
      bulk_store(to + i * (SLAB / 2), staged + i * SLAB, count * 128);
  }
  tma_store_commit();
  tma_store_wait_read<0>();
}
