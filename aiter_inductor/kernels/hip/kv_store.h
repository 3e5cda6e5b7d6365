// Rows of keys and values on their way into a cache of pages, and where they lie there.
//
// Defined by the build, see kv_cache.py: CACHE (element type), QUANT (rows are divided by a scale),
// PACKED (layout), BESIDE (tokens of a page whose values lie side by side, where PACKED), SLOT
// (integer type of the slot numbers), PAGE_SIZE.
//
//   paged:  keys and values   [num_pages, page_size, num_kv_heads, head_dim], any outer strides
//   packed: keys              [num_pages, num_kv_heads, head_dim / X, page_size, X]
//           values            [num_pages, num_kv_heads, page_size / BESIDE, head_dim, BESIDE]
//           X elements are 16 bytes
#pragma once

#include "quantize.h"

constexpr int PACK = 16 / (int)sizeof(CACHE);

// The page and the place in it that a token's rows go to; none for a slot outside the cache, such
// as the -1 of padding.
struct Slot {
  i64 page;
  int offset;
  bool inside;

  SIMT_DEVICE Slot of_token(const SLOT* slots, i32 token, i64 num_slots) {
    const i64 slot = slots[token];
    return {slot / PAGE_SIZE, (int)(slot % PAGE_SIZE), (u64)slot < (u64)num_slots};
  }
};

// Where the elements of a head's row of `width` lie, of which CONTIGUOUS are side by side.
struct KeyRow {
  static constexpr int CONTIGUOUS = PACKED ? PACK : 1 << 20;
  CACHE* base;

  SIMT_DEVICE KeyRow at(CACHE* cache, const Slot& slot, int head, int, i64 page_stride,
                        i64 slot_stride, i64 head_stride) {
    CACHE* page = cache + (slot.page * page_stride + head * head_stride);
    return {page + (PACKED ? slot.offset * PACK : slot.offset * slot_stride)};
  }
  SIMT_DEVICE CACHE* element(const KeyRow& row, int dim) {
    return row.base + (PACKED ? dim / PACK * (PAGE_SIZE * PACK) + dim % PACK : dim);
  }
};

struct ValueRow {
  static constexpr int CONTIGUOUS = PACKED ? 1 : 1 << 20;
  CACHE* base;

  SIMT_DEVICE ValueRow at(CACHE* cache, const Slot& slot, int head, int width, i64 page_stride,
                          i64 slot_stride, i64 head_stride) {
    CACHE* page = cache + (slot.page * page_stride + head * head_stride);
    const int group = slot.offset / BESIDE, lane = slot.offset % BESIDE;
    return {page + (PACKED ? group * width * BESIDE + lane : slot.offset * slot_stride)};
  }
  SIMT_DEVICE CACHE* element(const ValueRow& row, int dim) {
    return row.base + (PACKED ? dim * BESIDE : dim);
  }
};

template <int N> SIMT_DEVICE void store_run(CACHE* to, const float (&x)[N]) {
  if constexpr (QUANT)
    store_quantized(to, x);
  else
    store(to, x);
}

// N elements from `dim` on, a multiple of N, in as few stores as the layout lets them be.
template <class Row, int N>
SIMT_DEVICE void store_elements(const Row& row, int dim, const Divisor& divisor,
                                const float (&x)[N]) {
  float q[N];
  if constexpr (QUANT)
    quantize<CACHE, false>(divisor, x, q);
  else
    UNROLL for (int i = 0; i < N; i++) q[i] = x[i];
  constexpr int RUN = N < Row::CONTIGUOUS ? N : Row::CONTIGUOUS;
  UNROLL for (int first = 0; first < N; first += RUN) {
    float run[RUN];
    UNROLL for (int i = 0; i < RUN; i++) run[i] = q[first + i];
    store_run(Row::element(row, dim + first), run);
  }
}
