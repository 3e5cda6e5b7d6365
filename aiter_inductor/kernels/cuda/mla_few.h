// Latent attention over few keys: what clusters of mla_few.cu leave to mla_few_reduce.cu.
#pragma once

#include "barrier.h"
#include "mla.h"

constexpr u32 CLUSTER = BLOCKS * KEY_BLOCKS;
constexpr u32 COLUMNS = RANK / KEY_BLOCKS / 2;  // that a warpgroup sums
constexpr u32 QUADS = COLUMNS / 8;              // of sums, four each, that a thread holds

// The sums of one warpgroup of a block are a piece of a part of its rows. A thread of the reduction
// adds what the thread of this index left of each cluster's piece: nobody needs rows in order.
struct Parts {
  uint2* sums;    // [sequences, groups, clusters, CLUSTER, 2, QUADS, 128]: fp16 over a power of 2
  float2* scale;  // [sequences, groups, clusters, CLUSTER, 2, 64]: log2-sum-exp2, this power
  u32 groups, clusters;

  __device__ __forceinline__ u32 piece(u32 sequence, u32 group, u32 cluster, u32 rank,
                                       u32 half) const {
    return (((sequence * groups + group) * clusters + cluster) * CLUSTER + rank) * 2 + half;
  }
};

struct Result {
  u16* rows;
  i64 sequence, row;  // strides
  u32 count;          // rows of a sequence

  // A thread's quad `j` of a piece.
  __device__ __forceinline__ void store(u32 of_sequence, u32 group, u32 rank, u32 half, u32 j,
                                        const float (&x)[4]) const {
    const u32 column = rank / BLOCKS * (RANK / KEY_BLOCKS) + half * COLUMNS + j * 8;
    u16* const to = rows + of_sequence * sequence + column + threadIdx.x % 4 * 2;
    UNROLL for (u32 h = 0; h < 2; h++) {
      const u32 at = (group * BLOCKS + rank % BLOCKS) * 64 + row_of_thread() + h * 8;
      if (at < count) *(u32*)(to + at * row) = pack_bf16(x[2 * h], x[2 * h + 1]);
    }
  }
};
