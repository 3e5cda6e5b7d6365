// Write keys and values of new tokens into a cache of pages.
//
// Defined by the build, see kv_cache.py, beside what kv_store.h needs: X (type of keys and values),
// HEADS, KEY_DIM, VALUE_DIM, VEC elements a thread, THREADS a block.
#include "kv_store.h"

constexpr int KEY_UNITS = KEY_DIM / VEC, VALUE_UNITS = VALUE_DIM / VEC;
constexpr int TOKEN_UNITS = HEADS * (KEY_UNITS + VALUE_UNITS);

// One tensor's part of a thread's work: VEC elements of the row of `head`.
template <class Row, int DIM>
SIMT_DEVICE void move(const X* x, i64 token_stride, i64 head_stride, CACHE* cache,
                      i64 page_stride, i64 slot_stride, i64 cache_head_stride, const float* scale,
                      i32 token, const Slot& slot, int unit) {
  const int head = unit / (DIM / VEC), dim = unit % (DIM / VEC) * VEC;
  float row[VEC];
  load(x + (token * token_stride + head * head_stride + dim), row);
  const Divisor divisor = QUANT ? Divisor::by(*scale) : Divisor{};
  if (!slot.inside) return;
  store_elements(
      Row::at(cache, slot, head, DIM, page_stride, slot_stride, cache_head_stride), dim, divisor,
      row);
}

SIMT_KERNEL(THREADS)
kv_cache_write_kernel(const X* key, const X* value, CACHE* key_cache, CACHE* value_cache,
                      const SLOT* slots, const float* key_scale, const float* value_scale,
                      i32 num_tokens, i64 num_slots, i64 key_token, i64 key_head, i64 value_token,
                      i64 value_head, i64 key_cache_page, i64 key_cache_slot, i64 key_cache_head,
                      i64 value_cache_page, i64 value_cache_slot, i64 value_cache_head) {
  const u32 at = (u32)block_x() * THREADS + thread_index();
  const i32 token = at / TOKEN_UNITS;
  const int unit = at % TOKEN_UNITS;
  if (token >= num_tokens) return;
  begin();
  const Slot slot = Slot::of_token(slots, token, num_slots);
  if (unit < HEADS * KEY_UNITS)
    move<KeyRow, KEY_DIM>(key, key_token, key_head, key_cache, key_cache_page, key_cache_slot,
                          key_cache_head, key_scale, token, slot, unit);
  else
    move<ValueRow, VALUE_DIM>(value, value_token, value_head, value_cache, value_cache_page,
                              value_cache_slot, value_cache_head, value_scale, token, slot,
                              unit - HEADS * KEY_UNITS);
}
SIMT_ENTRY(kv_cache_write_kernel)
