// How many tokens of each sequence there are up to the last that its mask shows; a block for each.
// A cache whose rows are not all filled, and whose mask hides the rest, is then read up to there.
//
// Defined by the build, see decode_attention.py: MASK (see decode_mask.h), THREADS.
#include "decode_mask.h"

SIMT_KERNEL(THREADS)
decode_lengths(const MASK* mask, i32* lengths, i32 longest, i64 mask_seq, i64 mask_token) {
  begin();
  SIMT_SHARED u32 slots[THREADS / WAVE];
  const MASK* row = mask + block_x() * mask_seq;
  u32 length = 0;
  for (i32 token = thread_index(); token < longest; token += THREADS)
    if (mask_bias(row[token * mask_token]) != -__builtin_huge_valf()) length = token + 1;
  length = row_reduce<THREADS, THREADS, Largest>(length, slots);
  if (thread_index() == 0) lengths[block_x()] = (i32)length;
}
SIMT_ENTRY(decode_lengths)
