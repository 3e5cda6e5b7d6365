// Products of matrices by a wave, in one vocabulary for MFMA and mma.sync, and what lanes exchange.
//
//   C[16, COLUMNS] += A[16, 16] B[16, COLUMNS]
//
// Four lanes j = 0 to 3 share a group g; a lane holds, of row or column g, the four places 4 j to
// 4 j + 3 of the inner dimension, as pairs of 16 bits. mma.sync has two rows of A in a lane, g and
// g + 8, and 8 columns; an MFMA has one and 16. Each backend header defines
//
//   COLUMNS, ROWS (of A in a lane), OWN (columns of C in a lane), lane_group(), lane_quarter()
//   lane_at(group, quarter)
//   a_row(h)                     row h of A in this lane
//   quarter_of(row), place_of(row)    where a row of C is in an operand B made of it
//   c_row(r)                     row of C's element r, of 4; its column is column(r % OWN)
//   column(i)                    column i of C in this lane
//   multiply<T>(c, a, b)         T is bf16 or fp16
//   transposed<T>(c, b)          C rounded to T as an operand B of C's rows
//   shuffle(x, lane), in_any_lane(condition)
//   uniform(x)                   x, which all lanes have, where the chip can hold it once
//   lane_leads()                 whether this lane is the first that holds its columns of C
//   larger(a, b)                 the one that is not NaN, if the other is; log2_of(x)
//   over_rows<Op>(x)             over the lanes that hold the same columns of C
//   over_quarters<Op>(x)         over the lanes of a group
//   interleave(x, y, select)     four bytes: nibbles of `select` 0 to 3 are x's, 4 to 7 y's
//   fp8_pair<T>(word, high)      the two fp8 elements of half a word as fp16, exactly
#pragma once

#include "numeric.h"
#include "reduce.h"

#if defined(__HIP__) || defined(__HIPCC_RTC__)
#include "matrix_amd.h"
#elif defined(__CUDACC__)
#include "matrix_nvidia.h"
#else
#error "the host has no matrix instructions"
#endif
