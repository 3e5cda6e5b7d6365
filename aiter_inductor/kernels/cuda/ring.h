// Places in shared memory that one thread fills in turn and READERS warps empty.
#pragma once

#include "barrier.h"

template <u32 PLACES, u32 READERS> struct Ring {
  static constexpr u32 BYTES = 16 * PLACES;  // of its barriers: all full ones, then all empty ones

  u32 barriers, place = 0, parity = 0;

  __device__ explicit Ring(u32 barriers) : barriers(barriers) {}

  __device__ void init() const {
    for (u32 i = 0; i < PLACES; i++) {
      barrier_init(barriers + 8 * i, 1);
      barrier_init(barriers + 8 * (PLACES + i), READERS);
    }
  }
  __device__ u32 full() const { return barriers + 8 * place; }
  __device__ u32 empty() const { return barriers + 8 * (PLACES + place); }
  __device__ void wait_full() const { barrier_wait(full(), parity); }
  __device__ void wait_empty() const { barrier_wait(empty(), parity ^ 1); }
  __device__ void next() {
    if (++place == PLACES) {
      place = 0;
      parity ^= 1;
    }
  }
};

// What each warp of the readers does once it needs a place no longer; one lane arrives for all.
// compute-sanitizer's racecheck does not follow the other lanes' reads through __syncwarp to that
// arrival and reports them against the next copy; it reports nothing where every lane arrives.
DEVICE void release(u32 empty_barrier) {
  __syncwarp();
  if (threadIdx.x % WARP == 0) barrier_arrive(empty_barrier);
}
