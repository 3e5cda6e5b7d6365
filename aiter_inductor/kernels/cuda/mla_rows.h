// From finished sums to rows of the result, or to parts of rows that mla_reduce.cu adds.
#pragma once

#include "mla_load.h"

// Finished rows of a warpgroup, half of the columns, in the place of a tile: 16 bytes apart, so
// that there are no bank conflicts.
constexpr u32 HALF_ROW = RANK / 2 * 2 + 16;
static_assert(2 * ROWS * HALF_ROW <= TILE, "the rows fit in the place of a tile");

// Query or output rows: heads, or heads times new tokens, of each sequence. Strides in elements.
struct Rows {
  u16* start;
  i64 sequence, row;
  u32 count;  // of each sequence
};

// Rows of cut sequences, in fp16, each half over a power of 2; mla_reduce adds them.
struct Sums {
  u16* rows;
  float *lse, *scales;
  // Of row `row` of this block.
  __device__ __forceinline__ u32 row(u32 slot, u32 slots, u32 row) const {
    return ((blockIdx.y * slots + slot) * BLOCKS + blockIdx.x % BLOCKS) * ROWS + row;
  }
};

struct Outputs {
  Rows rows;
  Sums sums;
  u32 slots;
};

DEVICE u32 row_of_thread() {
  return threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
}

// Which half of the columns the sums of this thread's warpgroup are.
DEVICE u32 half_of_thread() { return thread_in_block() / WARPGROUP - 1; }

// Makes `factor` bring the highest of a row's half to 2^14 and more: fp16 then is as precise as if
// it had bf16's range. Stores by what the reduction has to multiply.
DEVICE void scale_rows(const float (&o)[128], float (&factor)[2], const Sums& sums, u32 first_row,
                       u32 half) {
  UNROLL for (u32 h = 0; h < 2; h++) {
    float highest = 0.0f;
    UNROLL for (u32 i = 0; i < 64; i++)
      highest = fmaxf(highest, fabsf(o[i / 2 * 4 + 2 * h + i % 2]));
    highest *= factor[h];
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    const u32 exponent = max(__float_as_uint(highest) >> 23, 27u);
    factor[h] *= __uint_as_float((268 - exponent) << 23);
    if (threadIdx.x % 4 == 0)
      sums.scales[(first_row + row_of_thread() + h * 8) * 2 + half] =
          __uint_as_float((exponent - 14) << 23);
  }
}

template <bool WHOLE_ROWS>
DEVICE void stage_rows(const float (&o)[128], const float (&factor)[2], u32 to) {
  UNROLL for (u32 j = 0; j < 16; j++) {
    u32 x[4];
    UNROLL for (u32 i = 0; i < 4; i++) {
      const float a = o[8 * j + 2 * i] * factor[i % 2], b = o[8 * j + 2 * i + 1] * factor[i % 2];
      x[i] = WHOLE_ROWS ? pack_bf16(a, b) : pack_fp16(a, b);
    }
    stmatrix_x4(to + j * 32, x[0], x[1], x[2], x[3]);
  }
}

// A warpgroup's half of the rows, by way of a place in shared memory, from which whole rows are
// copied.
DEVICE void store_rows(const float (&o)[128], u32 factors, u32 place, const Piece& piece,
                       const Outputs& outputs) {
  const u32 half = half_of_thread();
  const u32 thread = threadIdx.x % WARPGROUP, lane = thread % WARP, warp = thread / WARP;
  const u32 staged = place + half * ROWS * HALF_ROW, column = half * (RANK / 2);
  const u32 to = staged + (warp * 16 + lane % 16) * HALF_ROW + lane / 16 * 16;
  const u32 first_row = (blockIdx.y * BLOCKS + blockIdx.x % BLOCKS) * ROWS;
  const u32 first_sum = outputs.sums.row(piece.slot, outputs.slots, 0);
  float factor[2];
  UNROLL for (u32 h = 0; h < 2; h++)
    factor[h] = load_shared(factors + (row_of_thread() + h * 8) * 4);
  if (piece.slot == WHOLE) {
    stage_rows<true>(o, factor, to);
  } else {
    scale_rows(o, factor, outputs.sums, first_sum, half);
    stage_rows<false>(o, factor, to);
  }
  fence_shared();
  named_sync(2 + half, WARPGROUP);
  if (thread >= ROWS || first_row + thread >= outputs.rows.count) return;
  const Rows& rows = outputs.rows;
  u16* from = rows.start + piece.sequence * rows.sequence + (first_row + thread) * rows.row;
  if (piece.slot != WHOLE) from = outputs.sums.rows + (u64)(first_sum + thread) * RANK;
  bulk_store(from + column, staged + thread * HALF_ROW, RANK / 2 * 2);
  tma_store_commit();
  tma_store_wait_read<0>();
}
