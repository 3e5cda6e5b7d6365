// Rotary embedding of q and k; q becomes a tensor, k and v rows of a cache of pages. One launch.
//
// Defined by the build, see rope_kv.py, beside what rotation.h and kv_store.h need: X (type of q, k
// and v), IN_PAIRS and OUT_PAIRS, THREADS, UNITS a lane.
#include "kv_store.h"
#include "rotation.h"

// Where the elements of a head go: VEC or 2 * VEC of them from `dim` on.
struct ToTensor {
  X* out;

  template <int N> SIMT_DEVICE void put(const ToTensor& to, int dim, float (&x)[N]) {
    store(to.out + dim, x);
  }
};

template <class Row> struct ToCache {
  Row row;
  Divisor divisor;
  bool inside;

  template <int N> SIMT_DEVICE void put(const ToCache& to, int dim, float (&x)[N]) {
    round_all<X>(x);  // as the rotated key is where it is not fused
    if (to.inside) store_elements(to.row, dim, to.divisor, x);
  }
};

template <class To> SIMT_DEVICE void put_pairs(const To& to, int unit, const Unit& from) {
  if constexpr (OUT_PAIRS) {
    float both[2 * VEC];
    UNROLL for (int i = 0; i < VEC; i++) {
      both[2 * i] = from.a[i];
      both[2 * i + 1] = from.b[i];
    }
    To::put(to, unit * (2 * VEC), both);
  } else {
    Unit pairs = from;
    To::put(to, unit * VEC, pairs.a);
    To::put(to, HALF + unit * VEC, pairs.b);
  }
}

template <class To> SIMT_DEVICE void rotate_head(const X* x, const C* cos, const C* sin, To to) {
  Unit units[UNITS];
  UNROLL for (int i = 0; i < UNITS; i++) {
    const int unit = unit_of(i);
    if (is_rotated(unit)) load_pairs<X, IN_PAIRS>(x, unit, units[i]);
    if (is_tail(unit)) load(x + tail_offset(unit), units[i].a);
  }
  UNROLL for (int i = 0; i < UNITS; i++) {
    const int unit = unit_of(i);
    if (is_rotated(unit)) {
      Unit cosines, sines;
      load_table(cos, unit, cosines);
      load_table(sin, unit, sines);
      rotate(cosines, sines, units[i]);
      put_pairs(to, unit, units[i]);
    }
    if (is_tail(unit)) To::put(to, tail_offset(unit), units[i].a);
  }
}

template <class To> SIMT_DEVICE void copy_head(const X* x, To to) {
  UNROLL for (int dim = thread_index() % LANES * VEC; dim < HEAD_DIM; dim += LANES * VEC) {
    float elements[VEC];
    load(x + dim, elements);
    To::put(to, dim, elements);
  }
}

template <class Row>
SIMT_DEVICE ToCache<Row> to_cache(CACHE* cache, const Slot& slot, int head, const float* scale,
                                  i64 page_stride, i64 slot_stride, i64 head_stride) {
  return {Row::at(cache, slot, head, HEAD_DIM, page_stride, slot_stride, head_stride),
          QUANT ? Divisor::by(*scale) : Divisor{}, slot.inside};
}

SIMT_KERNEL(THREADS)
rope_kv_cache_write_kernel(
    const X* q, const X* k, const X* v, X* q_out, const C* cos, const C* sin, const i64* positions,
    CACHE* key_cache, CACHE* value_cache, const SLOT* slots, const float* key_scale,
    const float* value_scale, i32 num_rows, i32 num_heads, i32 num_kv_heads, i64 num_slots,
    i64 q_token, i64 q_head, i64 k_token, i64 k_head, i64 v_token, i64 v_head, i64 cos_token,
    i64 sin_token, i64 key_cache_page, i64 key_cache_slot, i64 key_cache_head,
    i64 value_cache_page, i64 value_cache_slot, i64 value_cache_head) {
  // Heads run fastest, so that those of one token read the same angles from the cache.
  const i64 row = (i64)block_x() * (THREADS / LANES) + thread_index() / LANES;
  if (row >= num_rows) return;
  const i32 all_heads = num_heads + 2 * num_kv_heads;
  const i32 token = (i32)row / all_heads, head = (i32)row % all_heads;
  const i32 k_index = head - num_heads, v_index = k_index - num_kv_heads;
  begin();
  if (v_index >= 0) {
    const Slot slot = Slot::of_token(slots, token, num_slots);
    copy_head(v + (token * v_token + v_index * v_head),
              to_cache<ValueRow>(value_cache, slot, v_index, value_scale, value_cache_page,
                                 value_cache_slot, value_cache_head));
    return;
  }
  const i64 position = positions ? positions[token] : token;
  const C *cosines = cos + position * cos_token, *sines = sin + position * sin_token;
  if (k_index >= 0) {
    const Slot slot = Slot::of_token(slots, token, num_slots);
    rotate_head(k + (token * k_token + k_index * k_head), cosines, sines,
                to_cache<KeyRow>(key_cache, slot, k_index, key_scale, key_cache_page,
                                 key_cache_slot, key_cache_head));
  } else {
    X* out = q_out + ((i64)token * num_heads + head) * HEAD_DIM;
    rotate_head(q + (token * q_token + head * q_head), cosines, sines, ToTensor{out});
  }
}
SIMT_ENTRY(rope_kv_cache_write_kernel)
