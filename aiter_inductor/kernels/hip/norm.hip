// (residual +) RMSNorm or LayerNorm (+ quantisation): one read of the inputs, one write of each
// output.
//
// Defined by the build, see norm.py, beside what norm.h needs: LATE (weight and bias are loaded once
// the row's reductions are through, and wait in a cache until then instead of in registers),
// RESIDUAL_AHEAD (the residual is fetched before the kernel ahead ends, which rarely wrote it).
#include "norm.h"

SIMT_KERNEL(THREADS)
norm_kernel(const X* x, const X* residual, const W* weight, const B* bias, X* sum, OUT* out,
            float* scale, i32 num_rows, i32 num_inner, i32 N, float eps, float weight_offset,
            float amax_min, i64 x_outer, i64 x_inner, i64 residual_outer, i64 residual_inner,
            i64 sum_outer, i64 sum_inner, i64 out_outer, i64 out_inner, i64 scale_outer,
            i64 scale_inner) {
  arrive_in_cluster<BLOCKS>();
  SIMT_SHARED u32 slots[MOMENT_SLOTS];
  const Place place = Place::of_thread(num_rows, num_inner, N);
  const float per_element = EXACT ? 1.0f / (BLOCKS * LANES * VECTORS * VEC) : 1.0f / (float)N;
  Inputs row;
  Vectors given;
  x = row_of(place, x, x_outer, x_inner);
  residual = row_of(place, residual, residual_outer, residual_inner);
  sum = row_of(place, sum, sum_outer, sum_inner);
  out = row_of(place, out, out_outer, out_inner);
  scale = row_of(place, scale, scale_outer, scale_inner);
  if constexpr (HAS_RESIDUAL && RESIDUAL_AHEAD)
    UNROLL for (int v = 0; v < VECTORS; v++)
      if (is_inside(place, v)) prefetch(residual + vector_of(place, v) * VEC);
  begin(first_of(place, x), given_or_null<HAS_RESIDUAL>(first_of(place, residual)),
        given_or_null<HAS_WEIGHT>(first_of(place, weight)),
        given_or_null<HAS_BIAS>(first_of(place, bias)),
        given_or_null<HAS_RESIDUAL>(first_of(place, sum)), first_of(place, out),
        given_or_null<(QUANT > 0)>(scale));
  row.x = load_row(place, x);
  if constexpr (HAS_RESIDUAL) row.residual = load_row(place, residual);
  if constexpr (!LATE) load_vectors(place, weight, bias, given);
  if constexpr (HAS_RESIDUAL) add_residual(place, sum, row);
  forget_row(row.x);
  wait_for_cluster<BLOCKS>();
  const Moments moments = moments_of(place, row.x, per_element, eps, slots);
  if constexpr (LATE) load_vectors(place, weight, bias, given);
  forget_row(row.x);
  PackedRow<Y> y;
  weigh(place, given, moments, weight_offset, row.x, y);
  store_row(place, out, scale, amax_min, y);
}
SIMT_ENTRY(norm_kernel)
