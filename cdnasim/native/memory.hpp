// Addresses, bounds and data movement shared by global, buffer, flat, scratch and LDS accesses.
#pragma once
#include "checks.hpp"

namespace cdnasim {

struct Addresses {
  alignas(64) u64 at[LANES];
  u64 present;  // lanes that reach memory
  u64 active;   // lanes that write their destination (a superset: out-of-range buffer loads give 0)
};

// Drop the lanes whose access is not inside one buffer, with a finding.
void check_bounds(Wave& w, const Ins& I, Addresses& a, int bytes);
bool in_bounds(Wave& w, u64 address, u64 bytes);

inline int access_bytes(const Shape& s) { return s.dwords ? 4 * s.dwords : s.bytes; }

void load_lanes(Wave& w, const Arg& to, const Shape& shape, const Addresses& a);
void store_lanes(Wave& w, const Arg& from, const Shape& shape, const Addresses& a);
// A load leaves defined values behind; `undefined` are lanes that got an undefined one.
void settle_load(Wave& w, const Ins& I, const Arg& to, const Shape& shape, u64 active,
                 u64 undefined);
u64 undefined_data(Wave& w, const Arg& from, const Shape& shape, u64 lanes);

// The lane addresses of global_* (vaddr, saddr), with `first` the index of vaddr.
void global_addresses(Wave& w, const Ins& I, int first, Addresses& a);
// Of buffer_*: vaddr, resource, soffset starting at argument `first`.
void buffer_addresses(Wave& w, const Ins& I, int first, int bytes, Addresses& a);

struct NamedShape {
  const char* suffix;
  Shape shape;
};
constexpr NamedShape LOAD_SHAPES[] = {
    {"dword", {1, 4, false, 0}},     {"dwordx2", {2, 8, false, 0}},
    {"dwordx3", {3, 12, false, 0}},  {"dwordx4", {4, 16, false, 0}},
    {"ubyte", {0, 1, false, 0}},     {"sbyte", {0, 1, true, 0}},
    {"ushort", {0, 2, false, 0}},    {"sshort", {0, 2, true, 0}},
    {"ubyte_d16", {0, 1, false, 1}}, {"ubyte_d16_hi", {0, 1, false, 2}},
    {"sbyte_d16", {0, 1, true, 1}},  {"sbyte_d16_hi", {0, 1, true, 2}},
    {"short_d16", {0, 2, false, 1}}, {"short_d16_hi", {0, 2, false, 2}},
};
constexpr NamedShape STORE_SHAPES[] = {
    {"dword", {1, 4, false, 0}},    {"dwordx2", {2, 8, false, 0}},
    {"dwordx3", {3, 12, false, 0}}, {"dwordx4", {4, 16, false, 0}},
    {"byte", {0, 1, false, 0}},     {"byte_d16_hi", {0, 1, false, 2}},
    {"short", {0, 2, false, 0}},    {"short_d16_hi", {0, 2, false, 2}},
};

}  // namespace cdnasim
