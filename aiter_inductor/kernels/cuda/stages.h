// Rows that TMA brings into shared memory ahead of the block that walks over them.
#pragma once

#include "barrier.h"
#include "tma.h"

// PLACES times ROWS rows of BYTES each. One thread fetches into a place again once all of the block
// have read it, behind a barrier that they need anyway.
template <u32 PLACES, u32 ROWS, u32 BYTES> struct Stages {
  static constexpr u32 STAGE_BYTES = ROWS * BYTES;

  u8* rows;
  u32 barriers, stage = 0, parity = 0;
  u64 once = l2_evict_first();

  __device__ Stages(u8* rows, u64* barriers) : rows(rows), barriers(shared_address(barriers)) {}

  __device__ void init() const {
    UNROLL for (u32 s = 0; s < PLACES; s++) barrier_init(barriers + 8 * s, 1);
    fence_barrier_init();
  }
  __device__ void fetch(u32 into, const void* const (&from)[ROWS]) const {
    const u32 to = shared_address(rows) + into * STAGE_BYTES, full = barriers + 8 * into;
    barrier_expect(full, STAGE_BYTES);
    UNROLL for (u32 row = 0; row < ROWS; row++)
      bulk_load(to + row * BYTES, from[row], BYTES, full, once);
  }
  __device__ const u8* wait() const {
    barrier_wait(barriers + 8 * stage, parity);
    return rows + stage * STAGE_BYTES;
  }
  __device__ void next() {
    if (++stage == PLACES) {
      stage = 0;
      parity ^= 1;
    }
  }
};
