// Rotary embedding of one head by a group of lanes, each of which holds units of pairs.
//
// Defined by the build: C (type of cos and sin), HALF (half of the rotated elements), TAIL (elements
// behind them that pass through), FULL_TABLE, TABLE_PAIRS (whether the two elements of a pair lie
// side by side there), TRANSPOSED, LANES a head, VEC pairs a unit.
#pragma once

#include "numeric.h"

constexpr int ROTATED_UNITS = HALF / VEC, TAIL_UNITS = TAIL / VEC;
constexpr int HEAD_DIM = 2 * HALF + TAIL;

// VEC pairs: the first elements in `a`, the second ones in `b`; of a tail, VEC elements in `a`.
struct Unit {
  float a[VEC], b[VEC];
};

// A unit as it lies in memory: PAIRS side by side, or the two halves.
template <class T, bool PAIRS> struct PackedUnit {
  static constexpr int PARTS = PAIRS ? 1 : 2;
  Packed<T, 2 * VEC / PARTS> parts[PARTS];
};

template <class T, bool PAIRS>
SIMT_DEVICE void load_packed_pairs(const T* from, int unit, PackedUnit<T, PAIRS>& to) {
  if constexpr (PAIRS) {
    load_packed(from + unit * (2 * VEC), to.parts[0]);
  } else {
    load_packed(from + unit * VEC, to.parts[0]);
    load_packed(from + HALF + unit * VEC, to.parts[1]);
  }
}

template <class T, bool PAIRS>
SIMT_DEVICE void unpack_pairs(const PackedUnit<T, PAIRS>& from, Unit& to) {
  if constexpr (PAIRS) {
    float both[2 * VEC];
    unpack(from.parts[0], both);
    UNROLL for (int i = 0; i < VEC; i++) {
      to.a[i] = both[2 * i];
      to.b[i] = both[2 * i + 1];
    }
  } else {
    unpack(from.parts[0], to.a);
    unpack(from.parts[1], to.b);
  }
}

template <class T, bool PAIRS> SIMT_DEVICE void load_pairs(const T* from, int unit, Unit& to) {
  PackedUnit<T, PAIRS> packed;
  load_packed_pairs(from, unit, packed);
  unpack_pairs(packed, to);
}

// The angles of a unit; a table of half the width has one for both elements of a pair.
struct PackedAngles {
  PackedUnit<C, TABLE_PAIRS> full;
  Packed<C, VEC> half;
};

SIMT_DEVICE void load_packed_table(const C* table, int unit, PackedAngles& to) {
  if constexpr (FULL_TABLE)
    load_packed_pairs(table, unit, to.full);
  else
    load_packed(table + unit * VEC, to.half);
}

SIMT_DEVICE void unpack_table(const PackedAngles& from, Unit& to) {
  if constexpr (FULL_TABLE) {
    unpack_pairs(from.full, to);
  } else {
    unpack(from.half, to.a);
    UNROLL for (int i = 0; i < VEC; i++) to.b[i] = to.a[i];
  }
}

SIMT_DEVICE void load_table(const C* table, int unit, Unit& to) {
  PackedAngles packed;
  load_packed_table(table, unit, packed);
  unpack_table(packed, to);
}

SIMT_DEVICE void rotate(const Unit& cosines, const Unit& sines, Unit& x) {
  UNROLL for (int i = 0; i < VEC; i++) {
    const float a = x.a[i], b = x.b[i];
    if constexpr (TRANSPOSED) {
      x.a[i] = a * cosines.a[i] + b * sines.b[i];
      x.b[i] = b * cosines.b[i] - a * sines.a[i];
    } else {
      x.a[i] = a * cosines.a[i] - b * sines.a[i];
      x.b[i] = b * cosines.b[i] + a * sines.b[i];
    }
  }
}

SIMT_DEVICE bool is_rotated(int unit) { return unit < ROTATED_UNITS; }
SIMT_DEVICE bool is_tail(int unit) {
  return unit >= ROTATED_UNITS && unit < ROTATED_UNITS + TAIL_UNITS;
}
SIMT_DEVICE int tail_offset(int unit) { return 2 * HALF + (unit - ROTATED_UNITS) * VEC; }
SIMT_DEVICE int unit_of(int i) { return thread_index() % LANES + i * LANES; }
