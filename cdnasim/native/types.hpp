// Integer names, bit casts and the lane loop that every file uses.
#pragma once
#include <cstdint>
#include <cstring>

namespace cdnasim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u64_view = u64 __attribute__((may_alias));  // two scalar registers seen as one

constexpr int LANES = 64;

#define FOR_LANES for (int lane = 0; lane < 64; lane++)

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float as_float(u32 bits) { return bit_cast<float>(bits); }
inline u32 as_bits(float value) { return bit_cast<u32>(value); }
inline double as_double(u64 bits) { return bit_cast<double>(bits); }
inline u64 as_bits64(double value) { return bit_cast<u64>(value); }
inline u64 join(u32 low, u32 high) { return low | (u64)high << 32; }

}  // namespace cdnasim
