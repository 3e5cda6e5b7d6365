// The normalisation of a row that threads hold, in steps.
//
// Defined by the build, see norm.py, beside what rows.h needs: X (type of x and residual), W (of
// the weight), B (of the bias), P (what x times weight promotes to), HAS_RESIDUAL, HAS_WEIGHT,
// HAS_BIAS, HAS_OFFSET (of the weight), LAYER_NORM, ROUND_BEFORE_WEIGHT, ROUND_NORM.
#pragma once

#include "rows.h"
#include "weight.h"

template <bool CHOICE, class First, class Second> struct Either {
  typedef First type;
};
template <class First, class Second> struct Either<false, First, Second> {
  typedef Second type;
};
// What a normalised row waits in until it is stored.
typedef Either<QUANT == 0, OUT, Either<ROUND_NORM, X, fp32>::type>::type Y;

struct Vectors {
  PackedRow<W> weight;
  PackedRow<B> bias;
};

struct Inputs {
  PackedRow<X> x, residual;
};

// sum = x + residual, rounded as it is stored; the norm reads the rounded sum.
SIMT_DEVICE void add_residual(const Place& place, X* sum, Inputs& row) {
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC], residual[VEC];
    unpack(row.x.vectors[v], x);
    unpack(row.residual.vectors[v], residual);
    UNROLL for (int i = 0; i < VEC; i++) x[i] += residual[i];
    pack(x, row.x.vectors[v]);
    if (is_inside(place, v)) store_packed(sum + vector_of(place, v) * VEC, row.x.vectors[v]);
  }
}

// What becomes of an element of a row: x * factor + shift.
struct Moments {
  float factor, shift;
};

constexpr int WIDTH = LANES < WAVE ? LANES : WAVE, WAVES = BLOCKS * (LANES / WIDTH);
constexpr int MOMENT_SLOTS = (LAYER_NORM ? 3 : 1) * WAVES;
static_assert(WAVES == 1 || LANES == THREADS, "a block holds one row, or rows of one wave each");

SIMT_DEVICE float wave_sum(float x) { return float_of(wave_reduce<WIDTH, Sum>(bits_of(x))); }

SIMT_DEVICE void forget_row(PackedRow<X>& row) {
  UNROLL for (int v = 0; v < VECTORS; v++) forget(row.vectors[v]);
}

// Mean, squared deviations and count of the elements that a wave holds of its row.
struct Part {
  float mean, squares, count;
};

SIMT_DEVICE float count_of_wave(const Place& place) {
  if constexpr (EXACT) return (float)(WIDTH * VECTORS * VEC);
  int count = 0;
  UNROLL for (int v = 0; v < VECTORS; v++) count += is_inside(place, v) ? VEC : 0;
  return wave_sum((float)count);
}

SIMT_DEVICE float squares_apart(const Place& place, PackedRow<X> row, float mean) {
  float sum = 0.0f;
  forget_row(row);
  UNROLL for (int v = 0; v < VECTORS; v++) {
    if (!is_inside(place, v)) continue;
    float x[VEC];
    unpack(row.vectors[v], x);
    UNROLL for (int i = 0; i < VEC; i++) {
      x[i] -= mean;
      sum = multiply_add(x[i], x[i], sum);
    }
  }
  return sum;
}

// A mean so far from 0 cancels more than 4 of the 24 bits of a difference of squares.
constexpr float FAR = 16.0f;

SIMT_DEVICE Part part_of_wave(const Place& place, const PackedRow<X>& row) {
  float sum = 0.0f, squares = 0.0f;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC];
    unpack(row.vectors[v], x);
    UNROLL for (int i = 0; i < VEC; i++) {
      if constexpr (LAYER_NORM) sum += x[i];
      squares = multiply_add(x[i], x[i], squares);
    }
  }
  squares = wave_sum(squares);
  if constexpr (!LAYER_NORM) return {0.0f, squares, 0.0f};
  const float count = count_of_wave(place);
  constexpr float WHOLE = 1.0f / (WIDTH * VECTORS * VEC);
  const float per_element = EXACT ? WHOLE : reciprocal(count > 0.0f ? count : 1.0f);
  const float mean = wave_sum(sum) * per_element, shared = mean * mean * count;
  const bool near = shared < FAR * (squares - shared);
  // Rows that share a wave may differ in this, and their lanes reduce together.
  if constexpr (WIDTH == WAVE && WAVES_PART)
    if (near) return {mean, squares - shared, count};
  const float apart = wave_sum(squares_apart(place, row, mean));
  return {mean, WIDTH == WAVE && !WAVES_PART && near ? squares - shared : apart, count};
}

// Over all waves of a row: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
// computing sample variances", 1979.
SIMT_DEVICE Part merged(const Part& part, float per_element, u32* slots) {
  const int wave = rank_of_block() * (LANES / WIDTH) + thread_index() / WAVE;
  share<BLOCKS>(slots + wave, bits_of(part.squares));
  if constexpr (LAYER_NORM) {
    share<BLOCKS>(slots + WAVES + wave, bits_of(part.mean));
    share<BLOCKS>(slots + 2 * WAVES + wave, bits_of(part.count));
  }
  barrier_of_row<BLOCKS>();
  Part whole = {};
  UNROLL for (int w = 0; w < WAVES; w++) whole.squares += float_of(slots[w]);
  if constexpr (LAYER_NORM) {
    UNROLL for (int w = 0; w < WAVES; w++)
      whole.mean = multiply_add(float_of(slots[WAVES + w]), float_of(slots[2 * WAVES + w]),
                                whole.mean);
    whole.mean *= per_element;
    UNROLL for (int w = 0; w < WAVES; w++) {
      const float apart = float_of(slots[WAVES + w]) - whole.mean;
      whole.squares = multiply_add(apart * apart, float_of(slots[2 * WAVES + w]), whole.squares);
    }
  }
  return whole;
}

// `per_element` is 1 / N.
SIMT_DEVICE Moments moments_of(const Place& place, const PackedRow<X>& row, float per_element,
                               float eps, u32* slots) {
  Part part = part_of_wave(place, row);
  if constexpr (WAVES > 1) part = merged(part, per_element, slots);
  const float factor = inverse_sqrt(multiply_add(part.squares, per_element, eps));
  return {factor, -part.mean * factor};
}

SIMT_DEVICE void add_bias(const Packed<B, VEC>& bias, float (&x)[VEC]) {
  float b[VEC];
  unpack(bias, b);
  UNROLL for (int i = 0; i < VEC; i++) x[i] += b[i];
}

// How the normalisation of a row ends: shifted, scaled, weighed, and rounded to Y.
SIMT_DEVICE void weigh(const Place& place, const Vectors& given, const Moments& moments,
                       float weight_offset, const PackedRow<X>& row, PackedRow<Y>& y) {
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC];
    unpack(row.vectors[v], x);
    UNROLL for (int i = 0; i < VEC; i++)
      x[i] = LAYER_NORM ? multiply_add(x[i], moments.factor, moments.shift) : x[i] * moments.factor;
    if constexpr (HAS_WEIGHT) {
      float w[VEC];
      unpack(given.weight.vectors[v], w);
      typedef Either<HAS_BIAS, void, Y>::type Next;
      multiply_by_weight<X, W, P, Next, ROUND_BEFORE_WEIGHT, HAS_OFFSET>(w, weight_offset, x);
    }
    if constexpr (HAS_BIAS) add_bias(given.bias.vectors[v], x);
    if constexpr (LAYER_NORM && !EXACT)
      if (!is_inside(place, v)) UNROLL for (int i = 0; i < VEC; i++) x[i] = 0.0f;
    pack(x, y.vectors[v]);
  }
}

SIMT_DEVICE void load_vectors(const Place& place, const W* weight, const B* bias, Vectors& to) {
  if constexpr (HAS_WEIGHT) to.weight = load_row(place, weight);
  if constexpr (HAS_BIAS) to.bias = load_row(place, bias);
}
