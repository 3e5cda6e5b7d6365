// Quantise rows: one scale a row, one a group, or a given one. Defined by the build, see quant.py,
// beside what rows.h needs: X, the type of x.
#include "rows.h"

SIMT_KERNEL(THREADS)
quant_kernel(const X* x, OUT* out, float* scale, i32 num_rows, i32 num_inner, i32 N, float amax_min,
             i64 x_outer, i64 x_inner, i64 out_outer, i64 out_inner, i64 scale_outer,
             i64 scale_inner) {
  const Place place = Place::of_thread(num_rows, num_inner, N);
  Row row;
  unpack_row(load_row(place, row_of(place, x, x_outer, x_inner)), row);
  store_row(place, row_of(place, out, out_outer, out_inner),
            row_of(place, scale, scale_outer, scale_inner), amax_min, row);
}
SIMT_ENTRY(quant_kernel)
