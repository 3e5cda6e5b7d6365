// act(gate) * up (+ quantisation), rounded after each step as eager code is.
//
// Defined by the build, see activation.py, beside what rows.h needs: X (type of gate and up),
// ACTIVATION (0 silu, 1 gelu, 2 gelu_tanh, 3 swiglu), INTERLEAVED (0: two tensors; else one, in
// which gate and up alternate: 1 begins with gate, 2 with up).
#include "rows.h"
#include "transcendental.h"

SIMT_DEVICE float activated(float x) {
  if constexpr (ACTIVATION == 0) return x * sigmoid(x);
  if constexpr (ACTIVATION == 1) return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
  if constexpr (ACTIVATION == 2) {
    const float inner = 0.797884561f * multiply_add(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
  }
}

// GPT-OSS's: (clamp(up) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit). NaN passes.
SIMT_DEVICE void swiglu(const float (&up)[VEC], float alpha, float limit, float (&x)[VEC]) {
  float gate[VEC], raised[VEC];
  UNROLL for (int i = 0; i < VEC; i++) {
    gate[i] = x[i] > limit ? limit : x[i];
    raised[i] = (up[i] > limit ? limit : up[i] < -limit ? -limit : up[i]) + 1.0f;
    x[i] = gate[i] * alpha;
  }
  round_all<X>(raised);
  round_all<X>(x);
  UNROLL for (int i = 0; i < VEC; i++) x[i] = sigmoid(x[i]);
  round_all<X>(x);
  UNROLL for (int i = 0; i < VEC; i++) x[i] *= gate[i];
  round_all<X>(x);
  UNROLL for (int i = 0; i < VEC; i++) x[i] *= raised[i];
}

SIMT_DEVICE void act_and_mul(const float (&up)[VEC], float alpha, float limit, float (&x)[VEC]) {
  if constexpr (ACTIVATION == 3) {
    swiglu(up, alpha, limit, x);
  } else {
    UNROLL for (int i = 0; i < VEC; i++) x[i] = activated(x[i]);
    round_all<X>(x);
    UNROLL for (int i = 0; i < VEC; i++) x[i] *= up[i];
  }
  round_all<X>(x);
}

struct GateAndUp {
  float gate[VEC], up[VEC];
};

SIMT_DEVICE void split(const Packed<X, 2 * VEC>& packed, GateAndUp& to) {
  float pairs[2 * VEC];
  unpack(packed, pairs);
  UNROLL for (int i = 0; i < VEC; i++) {
    to.gate[i] = pairs[2 * i + (INTERLEAVED == 2)];
    to.up[i] = pairs[2 * i + (INTERLEAVED == 1)];
  }
}

struct Inputs {
  PackedRow<X> gate, up;
  Packed<X, 2 * VEC> both[VECTORS];
};

SIMT_DEVICE void load_inputs(const Place& place, const X* gate, const X* up, Inputs& to) {
  if constexpr (INTERLEAVED) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
      to.both[v] = {};
      if (is_inside(place, v)) load_packed(gate + vector_of(place, v) * (2 * VEC), to.both[v]);
    }
  } else {
    to.gate = load_row(place, gate);
    to.up = load_row(place, up);
  }
}

// `gate` points to the first element of either where they are interleaved.
SIMT_KERNEL(THREADS)
act_kernel(const X* gate, const X* up, OUT* out, float* scale, i32 num_rows, i32 num_inner, i32 N,
           float alpha, float limit, float amax_min, i64 gate_outer, i64 gate_inner, i64 up_outer,
           i64 up_inner, i64 out_outer, i64 out_inner, i64 scale_outer, i64 scale_inner) {
  arrive_in_cluster<BLOCKS>();
  const Place place = Place::of_thread(num_rows, num_inner, N);
  gate = row_of(place, gate, gate_outer, gate_inner);
  up = row_of(place, up, up_outer, up_inner);
  out = row_of(place, out, out_outer, out_inner);
  scale = row_of(place, scale, scale_outer, scale_inner);
  begin(first_of(place, gate), first_of(place, up), first_of(place, out),
        given_or_null<(QUANT > 0)>(scale));
  Inputs inputs;
  load_inputs(place, gate, up, inputs);
  PackedRow<X> row;
  UNROLL for (int v = 0; v < VECTORS; v++) {
    GateAndUp pair;
    if constexpr (INTERLEAVED) {
      split(inputs.both[v], pair);
    } else {
      unpack(inputs.gate.vectors[v], pair.gate);
      unpack(inputs.up.vectors[v], pair.up);
    }
    act_and_mul(pair.up, alpha, limit, pair.gate);
    pack(pair.gate, row.vectors[v]);
  }
  wait_for_cluster<BLOCKS>();
  store_row(place, out, scale, amax_min, row);
}
SIMT_ENTRY(act_kernel)
