// A mask over the tokens of a sequence, the same for all heads: bytes that say whether a token is
// seen, or numbers that are added to scores.
//
// Defined by the build: MASK, the type of its elements: u8, bf16, fp16 or fp32.
#pragma once

#include "matrix.h"

SIMT_DEVICE float mask_bias(u8 seen) { return seen ? 0.0f : -__builtin_huge_valf(); }
SIMT_DEVICE float mask_bias(bf16 x) { return decode<bf16>(x.bits); }
SIMT_DEVICE float mask_bias(fp16 x) { return decode<fp16>(x.bits); }
SIMT_DEVICE float mask_bias(fp32 x) { return x; }
