// Where packed sequences lie, and which of them a block of rows belongs to.
//
// Rows are worked on in blocks of SIZE, each of one sequence. Sequence i has the slots from
// starts[i] / SIZE + i on, at least as many as it needs blocks: no count of blocks is made before.
#pragma once

#include "types.h"

struct Sequence {
  int number, start, length;
  int slot;  // its first one
};

// The sequence of a slot; `starts` has one entry a sequence, and the end of the last.
template <int SIZE> DEVICE Sequence sequence_of(const int* starts, int num_sequences, int slot) {
  int low = 0, high = num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (starts[middle] / SIZE + middle <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  const int start = starts[low];
  return {low, start, starts[low + 1] - start, start / SIZE + low};
}

// Zeros in rows [from, to) of columns of ROWS rows of 128 bytes, by the threads of one warpgroup.
template <int ROWS, int COLUMNS> DEVICE void clear_rows(u32 at, int from, int to) {
#pragma unroll 1
  for (int row = from + threadIdx.x % WARPGROUP / 8; row < to; row += WARPGROUP / 8) {
    UNROLL for (int column = 0; column < COLUMNS; column++)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                       at + column * ROWS * 128 + row * 128 + threadIdx.x % 8 * 16),
                   "r"(0)
                   : "memory");
  }
}
