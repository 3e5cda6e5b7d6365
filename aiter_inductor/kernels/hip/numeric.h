// Element types, vectors of them in memory, and conversions; fp32 is what kernels compute in.
#pragma once

#include "simt.h"

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
typedef float fp32;
struct fp8_e4m3fn {
  u8 bits;
};
struct fp8_e4m3fnuz {
  u8 bits;
};
struct int8 {
  u8 bits;
};

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

// A piece of memory that one instruction moves.
template <int BYTES> struct alignas(BYTES) Chunk {
  u32 words[BYTES / 4];
};
template <> struct alignas(2) Chunk<2> {
  u16 half;
};

// The bits of element i, of SIZE bytes.
template <int SIZE, int BYTES> SIMT_DEVICE u32 element(const Chunk<BYTES>& chunk, int i) {
  if constexpr (BYTES == 2)
    return chunk.half;
  else if constexpr (SIZE == 4)
    return chunk.words[i];
  else
    return chunk.words[i / 2] >> 16 * (i % 2) & 0xffff;
}

template <class T> SIMT_DEVICE float decode(u32 bits) {
  if constexpr (same<T, bf16>) return float_of(bits << 16);
  if constexpr (same<T, fp16>) return decode_fp16(bits);
  if constexpr (same<T, fp32>) return float_of(bits);
}

// Two elements of 16 bits in one word.
template <class T> SIMT_DEVICE u32 encode_pair(float low, float high) {
  if constexpr (same<T, bf16>) return encode_bf16x2(low, high);
  if constexpr (same<T, fp16>) return encode_fp16x2(low, high);
}

// x as it would be after a store and a load.
template <class T> SIMT_DEVICE float rounded(float x) {
  if constexpr (same<T, fp32>)
    return x;
  else
    return decode<T>(encode_pair<T>(x, 0.0f) & 0xffff);
}

template <class T, int N> SIMT_DEVICE void round_all(float (&x)[N]) {
  if constexpr (!same<T, fp32>) {
    if constexpr (N == 1) {
      x[0] = rounded<T>(x[0]);
    } else {
      UNROLL for (int i = 0; i < N; i += 2) {
        const u32 pair = encode_pair<T>(x[i], x[i + 1]);
        x[i] = decode<T>(pair & 0xffff);
        x[i + 1] = decode<T>(pair >> 16);
      }
    }
  }
}

// N elements as they lie in memory, so that loads can be issued long before their values are used.
template <class T, int N> struct Packed {
  static constexpr int BYTES = N * (int)sizeof(T), PART = BYTES < 16 ? BYTES : 16;
  static constexpr int EACH = PART / (int)sizeof(T);
  Chunk<PART> parts[BYTES / PART];
};

// `from` is aligned to the vector's size, or to 16 bytes where the vector is longer.
template <class T, int N> SIMT_DEVICE void load_packed(const T* from, Packed<T, N>& to) {
  typedef Packed<T, N> Vector;
  UNROLL for (int i = 0; i < Vector::BYTES / Vector::PART; i++)
    to.parts[i] = ((const Chunk<Vector::PART>*)from)[i];
}

template <class T, int N> SIMT_DEVICE void unpack(const Packed<T, N>& from, float (&to)[N]) {
  constexpr int EACH = Packed<T, N>::EACH;
  UNROLL for (int i = 0; i < N; i++)
    to[i] = decode<T>(element<(int)sizeof(T)>(from.parts[i / EACH], i % EACH));
}

template <class T, int N> SIMT_DEVICE void load(const T* from, float (&to)[N]) {
  Packed<T, N> packed;
  load_packed(from, packed);
  unpack(packed, to);
}

// Rounds to T. `pack` and `unpack` are each other's inverse for values that are a T already.
template <class T, int N> SIMT_DEVICE void pack(const float (&from)[N], Packed<T, N>& to) {
  constexpr int PART = Packed<T, N>::PART, WORDS = PART / 4;
  UNROLL for (int part = 0; part < Packed<T, N>::BYTES / PART; part++) {
    if constexpr (PART == 2) {
      to.parts[part].half = (u16)encode_pair<T>(from[0], 0.0f);
    } else {
      UNROLL for (int i = 0; i < WORDS; i++) {
        const int word = part * WORDS + i;
        if constexpr (sizeof(T) == 4)
          to.parts[part].words[i] = bits_of(from[word]);
        else
          to.parts[part].words[i] = encode_pair<T>(from[2 * word], from[2 * word + 1]);
      }
    }
  }
}

template <class T, int N> SIMT_DEVICE void store_packed(T* to, const Packed<T, N>& from) {
  typedef Packed<T, N> Vector;
  UNROLL for (int i = 0; i < Vector::BYTES / Vector::PART; i++)
    ((Chunk<Vector::PART>*)to)[i] = from.parts[i];
}

template <class T, int N> SIMT_DEVICE void store(T* to, const float (&from)[N]) {
  Packed<T, N> packed;
  pack(from, packed);
  store_packed(to, packed);
}

// Makes the compiler forget what these registers hold: a row in 16 bits is unpacked again after a
// reduction instead of waiting for it in 32.
template <class T, int N> SIMT_DEVICE void forget(Packed<T, N>& packed) {
  typedef Packed<T, N> Vector;
  if constexpr (Vector::PART >= 4 && sizeof(T) < 4)
    UNROLL for (int i = 0; i < Vector::BYTES / Vector::PART; i++)
      UNROLL for (int word = 0; word < Vector::PART / 4; word++)
        forget_word(packed.parts[i].words[word]);
}
