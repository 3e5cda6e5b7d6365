// Rows that threads keep in registers, and how they are stored: as they are or quantised.
//
// Defined by the build, see rows.py: OUT (element type of the output), QUANT (0 none, 1 one scale a
// row, 2 one a group, 3 given), GROUP, THREADS a block, LANES a row, VECTORS a thread, VEC elements
// a vector. A row without any reduction over all of it may be cut into chunks, one a block_y. EXACT
// promises that a block holds one row or chunk and that no vector lies outside it. BLOCKS share a
// row that is reduced over, a cluster where the chip has such; 1 elsewhere. Unless NESTED, one loop
// visits all rows.
#pragma once

#include "quantize.h"
#include "reduce.h"

constexpr bool PER_ROW = QUANT == 1, PER_GROUP = QUANT == 2, STATIC = QUANT == 3;
constexpr int SLOTS = BLOCKS * (THREADS / WAVE) + 1;

SIMT_DEVICE int rank_of_block() { return block_x() % BLOCKS; }

// Where a thread stands. Rows are visited by two nested loops; each tensor has a stride for either.
struct Place {
  u32 outer, inner;
  int first;  // of its vectors; the next ones follow in steps of LANES
  int num_vectors;

  SIMT_DEVICE Place of_thread(i32 num_rows, i32 num_inner, i32 N) {
    // Whole blocks and unsigned numbers save instructions that no load starts before.
    const u32 thread = thread_index(), in_block = THREADS == LANES ? 0 : thread / LANES;
    const u32 row = (u32)block_x() / BLOCKS * (THREADS / LANES) + in_block;
    const int chunk = BLOCKS > 1 ? rank_of_block() : block_y();
    const int first = chunk * (VECTORS * LANES) + (int)(thread - in_block * LANES);
    const int num_vectors = row < (u32)num_rows ? N / VEC : 0;
    // A division takes longer than a reduction.
    if (!NESTED || num_inner == 1) return {row, 0, first, num_vectors};
    return {row / (u32)num_inner, row % (u32)num_inner, first, num_vectors};
  }
};

template <class T> SIMT_DEVICE T* row_of(const Place& place, T* base, i64 outer, i64 inner) {
  i64 offset = (i64)place.outer * outer;
  if constexpr (NESTED) offset += (i64)place.inner * inner;
  return base + offset;
}

SIMT_DEVICE int vector_of(const Place& place, int v) { return place.first + v * LANES; }
SIMT_DEVICE bool is_inside(const Place& place, int v) {
  return EXACT || vector_of(place, v) < place.num_vectors;
}
// Where a thread's part of a row begins.
template <class T> SIMT_DEVICE T* first_of(const Place& place, T* row) {
  return row + place.first * VEC;
}

// An address that `begin` is to know only if there is something at it.
template <bool GIVEN, class T> SIMT_DEVICE T* given_or_null(T* address) {
  return GIVEN ? address : nullptr;
}

// A thread's part of a row, or of a vector of N elements that all rows share, still packed.
template <class T> struct PackedRow {
  Packed<T, VEC> vectors[VECTORS];
};

// What lies outside the row becomes 0.
template <class T> SIMT_DEVICE PackedRow<T> load_row(const Place& place, const T* row) {
  PackedRow<T> to = {};
  UNROLL for (int v = 0; v < VECTORS; v++)
    if (is_inside(place, v)) load_packed(row + vector_of(place, v) * VEC, to.vectors[v]);
  return to;
}

SIMT_DEVICE u32 largest_of(const float (&x)[VEC]) {
  u32 largest = 0;
  UNROLL for (int i = 0; i < VEC; i++) largest = Largest::of(largest, magnitude(x[i]));
  return largest;
}

// As the bits of an fp32. Magnitudes of 16 bits are ordered as integers too, and compared in pairs.
template <class T> SIMT_DEVICE u32 largest_of(const PackedRow<T>& row) {
  u32 largest = 0;
  if constexpr (sizeof(T) == 2 && VEC > 1) {
    UNROLL for (int v = 0; v < VECTORS; v++)
      UNROLL for (int i = 0; i < VEC / 2; i++) {
        constexpr int WORDS = Packed<T, VEC>::PART / 4;
        const u32 pair = row.vectors[v].parts[i / WORDS].words[i % WORDS];
        largest = larger_halves(largest, pair & 0x7fff7fff);
      }
    const u32 low = largest & 0xffff, high = largest >> 16;
    return bits_of(decode<T>(low > high ? low : high));
  } else {
    UNROLL for (int v = 0; v < VECTORS; v++) {
      float x[VEC];
      unpack(row.vectors[v], x);
      largest = Largest::of(largest, largest_of(x));
    }
    return largest;
  }
}

// `out` and `scale` point to the row's first element and scale; STATIC reads `scale`.
template <class T>
SIMT_DEVICE void store_row(const Place& place, OUT* out, float* scale, float amax_min,
                           PackedRow<T>& row) {
  SIMT_SHARED u32 slots[SLOTS];
  Divisor divisor;
  if constexpr (PER_ROW) {
    const u32 amax = row_reduce<LANES, THREADS, Largest, BLOCKS>(largest_of(row), slots, rank_of_block());
    divisor = Divisor::by(scale_of<OUT>(amax, amax_min));
    if (place.first == 0 && place.num_vectors) *scale = divisor.scale;
    UNROLL for (int v = 0; v < VECTORS; v++) forget(row.vectors[v]);
  }
  if constexpr (STATIC) divisor = Divisor::by(*scale);
  UNROLL for (int v = 0; v < VECTORS; v++) {
    const int at = vector_of(place, v) * VEC;
    if constexpr (QUANT == 0 && same<T, OUT>) {
      if (is_inside(place, v)) store_packed(out + at, row.vectors[v]);
      continue;
    }
    float x[VEC], q[VEC];
    unpack(row.vectors[v], x);
    if constexpr (PER_GROUP) {
      const u32 amax = wave_reduce<GROUP / VEC, Largest>(largest_of(x));
      divisor = Divisor::by(scale_of<OUT>(amax, amax_min));
      if (is_inside(place, v) && at % GROUP == 0) scale[at / GROUP] = divisor.scale;
    }
    if (!is_inside(place, v)) continue;
    if constexpr (QUANT == 0) {
      store(out + at, x);
    } else {
      quantize<OUT, !STATIC>(divisor, x, q);
      store_quantized(out + at, q);
    }
  }
}
