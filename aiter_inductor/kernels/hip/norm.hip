// (residual +) RMSNorm or LayerNorm (+ quantisation): one read of the inputs, one write of each
// output.
//
// Defined by the build, see norm.py, beside what rows.h needs: X (type of x and residual), W (of
// the weight), B (of the bias), P (what x times weight promotes to), HAS_RESIDUAL, HAS_WEIGHT,
// HAS_BIAS, LAYER_NORM, ROUND_BEFORE_WEIGHT, ROUND_NORM, LATE (weight and bias are loaded once the
// row's reductions are through, and wait in a cache until then instead of in registers).
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

SIMT_DEVICE float mean_of(const PackedRow<X>& row, i32 N) {
  SIMT_SHARED u32 slots[SLOTS];
  float sum = 0.0f;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC];
    unpack(row.vectors[v], x);
    UNROLL for (int i = 0; i < VEC; i++) sum += x[i];
  }
  return row_sum<LANES, THREADS>(sum, slots) / (float)N;
}

// Less the mean, but 0 beyond the row's end.
SIMT_DEVICE void centre(const Place& place, int v, float mean, float (&x)[VEC]) {
  const float shift = is_inside(place, v) ? mean : 0.0f;
  UNROLL for (int i = 0; i < VEC; i++) x[i] -= shift;
}

SIMT_DEVICE float inverse_root_mean_square(const Place& place, const PackedRow<X>& row, i32 N,
                                           float eps, float mean) {
  SIMT_SHARED u32 slots[SLOTS];
  float sum = 0.0f;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC];
    unpack(row.vectors[v], x);
    if constexpr (LAYER_NORM) centre(place, v, mean, x);
    UNROLL for (int i = 0; i < VEC; i++) sum = multiply_add(x[i], x[i], sum);
  }
  return inverse_sqrt(row_sum<LANES, THREADS>(sum, slots) / (float)N + eps);
}

SIMT_DEVICE void add_bias(const Packed<B, VEC>& bias, float (&x)[VEC]) {
  float b[VEC];
  unpack(bias, b);
  UNROLL for (int i = 0; i < VEC; i++) x[i] += b[i];
}

SIMT_DEVICE void forget_row(PackedRow<X>& row) {
  UNROLL for (int v = 0; v < VECTORS; v++) forget(row.vectors[v]);
}

// How the normalisation of a row ends: scaled, weighed, shifted, and rounded to Y.
SIMT_DEVICE void weigh(const Place& place, const Vectors& given, float mean, float factor,
                       float weight_offset, const PackedRow<X>& row, PackedRow<Y>& y) {
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float x[VEC];
    unpack(row.vectors[v], x);
    if constexpr (LAYER_NORM) centre(place, v, mean, x);
    UNROLL for (int i = 0; i < VEC; i++) x[i] *= factor;
    if constexpr (HAS_WEIGHT) {
      float w[VEC];
      unpack(given.weight.vectors[v], w);
      multiply_by_weight<X, W, P, ROUND_BEFORE_WEIGHT>(w, weight_offset, x);
    }
    if constexpr (HAS_BIAS) add_bias(given.bias.vectors[v], x);
    pack(x, y.vectors[v]);
  }
}

SIMT_DEVICE void load_vectors(const Place& place, const W* weight, const B* bias, Vectors& to) {
  if constexpr (HAS_WEIGHT) to.weight = load_row(place, weight);
  if constexpr (HAS_BIAS) to.bias = load_row(place, bias);
}

SIMT_KERNEL(THREADS)
norm_kernel(const X* x, const X* residual, const W* weight, const B* bias, X* sum, OUT* out,
            float* scale, i32 num_rows, i32 num_inner, i32 N, float eps, float weight_offset,
            float amax_min, i64 x_outer, i64 x_inner, i64 residual_outer, i64 residual_inner,
            i64 sum_outer, i64 sum_inner, i64 out_outer, i64 out_inner, i64 scale_outer,
            i64 scale_inner) {
  const Place place = Place::of_thread(num_rows, num_inner, N);
  Inputs row;
  Vectors given;
  row.x = load_row(place, row_of(place, x, x_outer, x_inner));
  if constexpr (HAS_RESIDUAL)
    row.residual = load_row(place, row_of(place, residual, residual_outer, residual_inner));
  if constexpr (!LATE) load_vectors(place, weight, bias, given);
  if constexpr (HAS_RESIDUAL) add_residual(place, row_of(place, sum, sum_outer, sum_inner), row);
  forget_row(row.x);
  float mean = 0.0f;
  if constexpr (LAYER_NORM) {
    mean = mean_of(row.x, N);
    forget_row(row.x);
  }
  const float factor = inverse_root_mean_square(place, row.x, N, eps, mean);
  if constexpr (LATE) load_vectors(place, weight, bias, given);
  forget_row(row.x);
  PackedRow<Y> y;
  weigh(place, given, mean, factor, weight_offset, row.x, y);
  store_row(place, row_of(place, out, out_outer, out_inner),
            row_of(place, scale, scale_outer, scale_inner), amax_min, y);
}
SIMT_ENTRY(norm_kernel)
