// Quantise rows: one scale a row, one a group, a given one, or one for the whole tensor. Defined by
// the build, see quant.py, beside what rows.h needs: X, the type of x.
#include "rows.h"

SIMT_KERNEL(THREADS)
quant_kernel(const X* x, OUT* out, float* scale, i32 num_rows, i32 num_inner, i32 N, float amax_min,
             i64 x_outer, i64 x_inner, i64 out_outer, i64 out_inner, i64 scale_outer,
             i64 scale_inner) {
  arrive_in_cluster<BLOCKS>();
  const Place place = Place::of_thread(num_rows, num_inner, N);
  x = row_of(place, x, x_outer, x_inner);
  out = row_of(place, out, out_outer, out_inner);
  scale = row_of(place, scale, scale_outer, scale_inner);
  begin(first_of(place, x), first_of(place, out), scale);
  PackedRow<X> row = load_row(place, x);
  wait_for_cluster<BLOCKS>();
  store_row(place, out, scale, amax_min, row);
}
SIMT_ENTRY(quant_kernel)

// amax, which starts at 0, becomes the bits of the largest magnitude; NaN counts as the largest.
SIMT_KERNEL(THREADS)
amax_kernel(const X* x, u32* amax, i32 num_rows, i32 num_inner, i32 N, i64 x_outer, i64 x_inner) {
  SIMT_SHARED u32 slots[SLOTS];
  const Place place = Place::of_thread(num_rows, num_inner, N);
  x = row_of(place, x, x_outer, x_inner);
  begin(first_of(place, x), amax);
  const PackedRow<X> row = load_row(place, x);
  const u32 largest = row_reduce<THREADS, THREADS, Largest>(largest_of(row), slots);
  if (thread_index() == 0) atomic_max(amax, largest);
}
SIMT_ENTRY(amax_kernel)

// quant_kernel with the scale that follows from `amax`; the first thread of all stores it.
SIMT_KERNEL(THREADS)
quant_by_amax_kernel(const X* x, OUT* out, float* scale, const u32* amax, i32 num_rows,
                     i32 num_inner, i32 N, float amax_min, i64 x_outer, i64 x_inner, i64 out_outer,
                     i64 out_inner) {
  const Place place = Place::of_thread(num_rows, num_inner, N);
  x = row_of(place, x, x_outer, x_inner);
  out = row_of(place, out, out_outer, out_inner);
  begin(first_of(place, x), first_of(place, out), amax);
  PackedRow<X> row = load_row(place, x);
  float given = scale_of<OUT>(*amax, amax_min);
  if (block_x() + block_y() + thread_index() == 0) *scale = given;
  store_row(place, out, &given, amax_min, row);
}
SIMT_ENTRY(quant_by_amax_kernel)
