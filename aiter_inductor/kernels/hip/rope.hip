// (RMSNorm of each head +) rotary embedding of all heads of q and k in one launch.
//
// Defined by the build, see rope.py: X (type of q and k), C (of cos and sin), OUT, W (of the
// weights), P (what x times weight promotes to), NORM, ROUND_BEFORE_WEIGHT, HAS_OFFSET (of the
// weights), HALF (half of the rotated elements), TAIL (elements behind them that pass through),
// IN_PAIRS and OUT_PAIRS (whether the two elements of a pair lie side by side), FULL_TABLE,
// TABLE_PAIRS, TRANSPOSED, THREADS, LANES a head, UNITS a lane, VEC pairs a unit.
#include "reduce.h"
#include "rotation.h"
#include "weight.h"

SIMT_DEVICE void store_pairs(OUT* to, int unit, const Unit& from) {
  if constexpr (OUT_PAIRS) {
    float both[2 * VEC];
    UNROLL for (int i = 0; i < VEC; i++) {
      both[2 * i] = from.a[i];
      both[2 * i + 1] = from.b[i];
    }
    store(to + unit * (2 * VEC), both);
  } else {
    store(to + unit * VEC, from.a);
    store(to + HALF + unit * VEC, from.b);
  }
}

// Which head a group of lanes handles, and where it lies in q or k, the tables and the output.
struct Head {
  const X* x;
  OUT* out;
  const W* weight;
  const C *cos, *sin;
};

// Elements between the start of a tensor and a head of it.
SIMT_DEVICE i64 offset_of(u32 batch, u32 head, u32 token, i64 by_batch, i64 by_head, i64 by_token) {
  return (i64)batch * by_batch + (i64)head * by_head + (i64)token * by_token;
}

template <class T> struct PackedPart {
  PackedUnit<T, IN_PAIRS> unit;
  Packed<T, VEC> tail;
};

// A lane's part of a head, and of what is combined with it, all loaded before any is used.
struct PackedHead {
  PackedPart<X> x[UNITS];
  PackedPart<W> weight[UNITS];
  PackedAngles cos[UNITS], sin[UNITS];
};

template <class T> SIMT_DEVICE void load_part(const T* from, int unit, PackedPart<T>& to) {
  if (is_rotated(unit)) load_packed_pairs(from, unit, to.unit);
  if constexpr (TAIL)
    if (is_tail(unit)) load_packed(from + tail_offset(unit), to.tail);
}

SIMT_DEVICE void load_head(const Head& head, PackedHead& to) {
  UNROLL for (int i = 0; i < UNITS; i++) load_part(head.x, unit_of(i), to.x[i]);
  UNROLL for (int i = 0; i < UNITS; i++) {
    if (is_rotated(unit_of(i))) {
      load_packed_table(head.cos, unit_of(i), to.cos[i]);
      load_packed_table(head.sin, unit_of(i), to.sin[i]);
    }
    if constexpr (NORM) load_part(head.weight, unit_of(i), to.weight[i]);
  }
}

template <class T> SIMT_DEVICE void unpack_part(const PackedPart<T>& from, int i, Unit& to) {
  unpack_pairs(from.unit, to);
  if constexpr (TAIL)
    if (is_tail(unit_of(i))) unpack(from.tail, to.a);
}

// The weights lie as x does.
SIMT_DEVICE void weigh(const PackedPart<W>& weight, int i, float offset, Unit& x) {
  Unit w;
  unpack_part(weight, i, w);
  multiply_by_weight<X, W, P, X, ROUND_BEFORE_WEIGHT, HAS_OFFSET>(w.a, offset, x.a);
  multiply_by_weight<X, W, P, X, ROUND_BEFORE_WEIGHT, HAS_OFFSET>(w.b, offset, x.b);
  round_all<X>(x.a);
  round_all<X>(x.b);
}

SIMT_DEVICE void normalize(const PackedHead& head, float eps, float offset, Unit (&x)[UNITS]) {
  float sum = 0.0f;
  UNROLL for (int i = 0; i < UNITS; i++)
    UNROLL for (int j = 0; j < VEC; j++)
      sum = multiply_add(x[i].a[j], x[i].a[j], multiply_add(x[i].b[j], x[i].b[j], sum));
  sum = float_of(wave_reduce<LANES, Sum>(bits_of(sum)));
  const float factor = inverse_sqrt(sum / (float)HEAD_DIM + eps);
  UNROLL for (int i = 0; i < UNITS; i++) {
    UNROLL for (int j = 0; j < VEC; j++) {
      x[i].a[j] *= factor;
      x[i].b[j] *= factor;
    }
    weigh(head.weight[i], i, offset, x[i]);
  }
}

SIMT_DEVICE void rotate_and_store(const PackedHead& head, OUT* out, Unit (&x)[UNITS]) {
  UNROLL for (int i = 0; i < UNITS; i++) {
    const int unit = unit_of(i);
    if (is_rotated(unit)) {
      Unit cosines, sines;
      unpack_table(head.cos[i], cosines);
      unpack_table(head.sin[i], sines);
      rotate(cosines, sines, x[i]);
      store_pairs(out, unit, x[i]);
    }
    if (is_tail(unit)) store(out + tail_offset(unit), x[i].a);
  }
}

SIMT_KERNEL(THREADS)
rope_kernel(const X* q, const X* k, OUT* q_out, OUT* k_out, const W* q_weight, const W* k_weight,
            const C* cos, const C* sin, i32 num_rows, i32 seq_len, i32 num_heads, i32 num_kv_heads,
            float eps, float weight_offset, i64 q_batch, i64 q_head, i64 q_token, i64 k_batch,
            i64 k_head, i64 k_token, i64 q_out_batch, i64 q_out_head, i64 q_out_token,
            i64 k_out_batch, i64 k_out_head, i64 k_out_token, i64 cos_batch, i64 cos_token,
            i64 sin_batch, i64 sin_token) {
  // Heads run fastest, so that those of one token read the same angles from the cache.
  // Of unsigned numbers of 32 bits a division and a product with a stride are half as long. Lanes
  // beyond the last head compute the first one, and store nothing.
  const u32 row = (u32)block_x() * (THREADS / LANES) + (u32)thread_index() / LANES;
  const bool live = row < (u32)num_rows;
  const u32 some_row = live ? row : 0, all_heads = num_heads + num_kv_heads;
  // Heads run fastest, so that those of one token read the same angles from the cache.
  const u32 position = some_row / all_heads, index = some_row % all_heads;
  const u32 batch = position / (u32)seq_len, token = position % (u32)seq_len;
  const bool is_q = index < (u32)num_heads;
  const u32 own = is_q ? index : index - num_heads;
  const i64 from = offset_of(batch, own, token, is_q ? q_batch : k_batch, is_q ? q_head : k_head,
                             is_q ? q_token : k_token);
  const i64 to = offset_of(batch, own, token, is_q ? q_out_batch : k_out_batch,
                           is_q ? q_out_head : k_out_head, is_q ? q_out_token : k_out_token);
  const Head head = {
      (is_q ? q : k) + from,
      (is_q ? q_out : k_out) + to,
      is_q ? q_weight : k_weight,
      cos + offset_of(batch, 0, token, cos_batch, 0, cos_token),
      sin + offset_of(batch, 0, token, sin_batch, 0, sin_token),
  };
  begin(head.x, head.cos, head.sin, head.weight, head.out);
  PackedHead packed = {};
  load_head(head, packed);
  Unit x[UNITS] = {};
  UNROLL for (int i = 0; i < UNITS; i++) unpack_part(packed.x[i], i, x[i]);
  if constexpr (NORM) normalize(packed, eps, weight_offset, x);
  if (live) rotate_and_store(packed, head.out, x);
}
SIMT_ENTRY(rope_kernel)
