// (residual +) RMSNorm or LayerNorm (+ quantisation): one read of the inputs, one write of each
// output.
//
// Defined by the build, see norm.py, beside what rows.h needs: X (type of x and residual), W (of
// the weight), B (of the bias), P (what x times weight promotes to), HAS_RESIDUAL, HAS_WEIGHT,
// HAS_BIAS, LAYER_NORM, ROUND_BEFORE_WEIGHT, ROUND_NORM.
#include "rows.h"
#include "weight.h"

// sum = x + residual, rounded as it is stored; the norm reads the rounded sum.
SIMT_DEVICE void add_residual(const Place& place, const PackedRow<X>& residual, X* sum, Row& x) {
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float added[VEC];
    unpack(residual.vectors[v], added);
    UNROLL for (int i = 0; i < VEC; i++) x[v][i] += added[i];
    round_all<X>(x[v]);
    if (is_inside(place, v)) store(sum + vector_of(place, v) * VEC, x[v]);
  }
}

SIMT_DEVICE void subtract_mean(const Place& place, i32 N, Row& x) {
  SIMT_SHARED u32 slots[SLOTS];
  float sum = 0.0f;
  UNROLL for (int v = 0; v < VECTORS; v++)
    UNROLL for (int i = 0; i < VEC; i++) sum += x[v][i];
  const float mean = row_sum<LANES, THREADS>(sum, slots) / (float)N;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    const float shift = is_inside(place, v) ? mean : 0.0f;
    UNROLL for (int i = 0; i < VEC; i++) x[v][i] -= shift;
  }
}

SIMT_DEVICE void divide_by_root_mean_square(i32 N, float eps, Row& x) {
  SIMT_SHARED u32 slots[SLOTS];
  float sum = 0.0f;
  UNROLL for (int v = 0; v < VECTORS; v++)
    UNROLL for (int i = 0; i < VEC; i++) sum = multiply_add(x[v][i], x[v][i], sum);
  const float mean = row_sum<LANES, THREADS>(sum, slots) / (float)N;
  const float factor = inverse_sqrt(mean + eps);
  UNROLL for (int v = 0; v < VECTORS; v++)
    UNROLL for (int i = 0; i < VEC; i++) x[v][i] *= factor;
}

SIMT_DEVICE void add_bias(const Packed<B, VEC>& bias, float (&x)[VEC]) {
  float b[VEC];
  unpack(bias, b);
  UNROLL for (int i = 0; i < VEC; i++) x[i] += b[i];
}

SIMT_KERNEL(THREADS)
norm_kernel(const X* x, const X* residual, const W* weight, const B* bias, X* sum, OUT* out,
            float* scale, i32 num_rows, i32 num_inner, i32 N, float eps, float weight_offset,
            float amax_min, i64 x_outer, i64 x_inner, i64 residual_outer, i64 residual_inner,
            i64 sum_outer, i64 sum_inner, i64 out_outer, i64 out_inner, i64 scale_outer,
            i64 scale_inner) {
  const Place place = Place::of_thread(num_rows, num_inner, N);
  // All loads come first: a reduction waits for every thread, so none should start behind one.
  const PackedRow<X> packed = load_row(place, row_of(place, x, x_outer, x_inner));
  PackedRow<X> packed_residual;
  PackedRow<W> packed_weight;
  PackedRow<B> packed_bias;
  if constexpr (HAS_RESIDUAL)
    packed_residual = load_row(place, row_of(place, residual, residual_outer, residual_inner));
  if constexpr (HAS_WEIGHT) packed_weight = load_row(place, weight);
  if constexpr (HAS_BIAS) packed_bias = load_row(place, bias);
  Row row;
  unpack_row(packed, row);
  if constexpr (HAS_RESIDUAL)
    add_residual(place, packed_residual, row_of(place, sum, sum_outer, sum_inner), row);
  if (LAYER_NORM) subtract_mean(place, N, row);
  divide_by_root_mean_square(N, eps, row);
  UNROLL for (int v = 0; v < VECTORS; v++) {
    if constexpr (HAS_WEIGHT) {
      float w[VEC];
      unpack(packed_weight.vectors[v], w);
      multiply_by_weight<X, W, P, ROUND_BEFORE_WEIGHT>(w, weight_offset, row[v]);
    }
    if constexpr (HAS_BIAS) add_bias(packed_bias.vectors[v], row[v]);
    if (ROUND_NORM) round_all<X>(row[v]);
  }
  store_row(place, row_of(place, out, out_outer, out_inner),
            row_of(place, scale, scale_outer, scale_inner), amax_min, row);
}
SIMT_ENTRY(norm_kernel)
