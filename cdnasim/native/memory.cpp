#include "memory.hpp"

namespace cdnasim {

static const Range* find_range(const std::vector<Range>& ranges, u64 address) {
  size_t low = 0, high = ranges.size();
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (ranges[middle].begin <= address) low = middle + 1;
    else high = middle;
  }
  return low ? &ranges[low - 1] : nullptr;
}
static bool inside(const Range* r, u64 address, u64 bytes) {
  return r && address >= r->begin && address + bytes <= r->end;
}
bool in_bounds(Wave& w, u64 address, u64 bytes) {
  return inside(find_range(*w.group->ranges, address), address, bytes);
}

void check_bounds(Wave& w, const Ins& I, Addresses& a, int bytes) {
  const std::vector<Range>& ranges = *w.group->ranges;
  if (!a.present) return;
  u64 low = ~0ull, high = 0;
  FOR_LANES {
    bool here = a.present >> lane & 1;
    low = here && a.at[lane] < low ? a.at[lane] : low;
    high = here && a.at[lane] > high ? a.at[lane] : high;
  }
  if (w.last_range < ranges.size() && low >= ranges[w.last_range].begin &&
      high + bytes <= ranges[w.last_range].end)
    return;
  const Range* r = nullptr;
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    u64 address = a.at[lane];
    if (!inside(r, address, bytes)) r = find_range(ranges, address);
    if (inside(r, address, bytes)) continue;
    a.present &= ~(1ull << lane);
    const char* verb = I.flags & STORES ? "write" : "read";
    if (r)
      report(w, I, OUT_OF_BOUNDS, lane, -1,
             "%s of %d bytes at %#llx, %lld bytes past the end of the nearest buffer (%llu bytes)",
             verb, bytes, (unsigned long long)address, (long long)(address + bytes - r->end),
             (unsigned long long)(r->end - r->begin));
    else
      report(w, I, OUT_OF_BOUNDS, lane, -1, "%s of %d bytes at %#llx, below every buffer", verb,
             bytes, (unsigned long long)address);
    r = nullptr;
  }
  if (r) w.last_range = r - ranges.data();
}

// Lanes that read consecutive addresses, all active: the common case, moved as one block.
static bool contiguous(const Addresses& a, int bytes) {
  if (a.present != ~0ull) return false;
  u64 different = 0;
  FOR_LANES different |= a.at[lane] - a.at[0] - (u64)lane * bytes;
  return !different;
}

template <int N>
static void load_dwords(Wave& w, int reg, const Addresses& a) {
  if (contiguous(a, 4 * N)) {
    const u32* p = (const u32*)a.at[0];
    for (int d = 0; d < N; d++) {
      u32* to = w.v[reg + d];
      FOR_LANES memcpy(&to[lane], p + N * lane + d, 4);
    }
    return;
  }
  if (a.present == ~0ull) {  // without a branch a lane
    FOR_LANES {
      u32 words[N];
      memcpy(words, (const void*)a.at[lane], 4 * N);
      for (int d = 0; d < N; d++) w.v[reg + d][lane] = words[d];
    }
    return;
  }
  FOR_LANES {
    if (!(a.active >> lane & 1)) continue;
    u32 words[N] = {};
    if (a.present >> lane & 1) memcpy(words, (const void*)a.at[lane], 4 * N);
    for (int d = 0; d < N; d++) w.v[reg + d][lane] = words[d];
  }
}
static void load_part(Wave& w, int reg, const Shape& s, const Addresses& a) {
  FOR_LANES {
    if (!(a.active >> lane & 1)) continue;
    u32 x = 0;
    if (a.present >> lane & 1) memcpy(&x, (const void*)a.at[lane], s.bytes);
    if (s.is_signed) x = (u32)sign_extend(x, 8 * s.bytes);
    u32& to = w.v[reg][lane];
    if (s.half == 0) to = x;
    if (s.half == 1) to = (to & 0xffff0000) | (x & 0xffff);
    if (s.half == 2) to = (to & 0xffff) | x << 16;
  }
}
void load_lanes(Wave& w, const Arg& to, const Shape& s, const Addresses& a) {
  switch (s.dwords) {
    case 0: return load_part(w, to.index, s, a);
    case 1: return load_dwords<1>(w, to.index, a);
    case 2: return load_dwords<2>(w, to.index, a);
    case 3: return load_dwords<3>(w, to.index, a);
    case 4: return load_dwords<4>(w, to.index, a);
  }
}

void settle_load(Wave& w, const Ins& I, const Arg& to, const Shape& s, u64 active, u64 undefined) {
  u32 field = s.half == 0 ? ~0u : s.half == 1 ? 0xffff : 0xffff0000;
  for (int d = 0; d < (s.dwords ? s.dwords : 1); d++) {
    int reg = to.index + d;
    if (!undefined && !w.tainted.has(reg)) continue;
    u32 any = 0;
    FOR_LANES {
      u32& t = w.undefined[reg][lane];
      if (active >> lane & 1) t = undefined >> lane & 1 ? t | field : t & ~field;
      any |= t;
    }
    if (!any) {
      w.tainted.remove(reg);
    } else {
      w.tainted.add(reg);
      w.attention.add(reg);
      if (undefined) w.origin[reg] = {I.pc, -1};
    }
  }
}

template <int N>
static void store_dwords(Wave& w, int reg, const Addresses& a) {
  FOR_LANES {
    if (!(a.present >> lane & 1)) continue;
    u32 words[N];
    for (int d = 0; d < N; d++) words[d] = w.v[reg + d][lane];
    memcpy((void*)a.at[lane], words, 4 * N);
  }
}
void store_lanes(Wave& w, const Arg& from, const Shape& s, const Addresses& a) {
  switch (s.dwords) {
    case 1: return store_dwords<1>(w, from.index, a);
    case 2: return store_dwords<2>(w, from.index, a);
    case 3: return store_dwords<3>(w, from.index, a);
    case 4: return store_dwords<4>(w, from.index, a);
  }
  FOR_LANES {
    if (!(a.present >> lane & 1)) continue;
    u32 x = w.v[from.index][lane] >> (s.half == 2 ? 16 : 0);
    memcpy((void*)a.at[lane], &x, s.bytes);
  }
}

// Lanes whose stored bits are not all defined.
u64 undefined_data(Wave& w, const Arg& from, const Shape& s, u64 lanes) {
  u64 mask = 0;
  u32 field = s.dwords ? ~0u : ((1u << 8 * s.bytes) - 1) << (s.half == 2 ? 16 : 0);
  for (int d = 0; d < (s.dwords ? s.dwords : 1); d++) {
    if (!w.tainted.has(from.index + d)) continue;
    FOR_LANES mask |= (u64)((w.undefined[from.index + d][lane] & field) != 0) << lane;
  }
  return mask & lanes;
}

void global_addresses(Wave& w, const Ins& I, int first, Addresses& a) {
  const Arg& vaddr = I.args[first];
  const Arg* saddr = nullptr;
  for (int k = first + 1; k < I.nargs; k++)
    if (I.args[k].kind == ARG_SGPR) saddr = &I.args[k];
  u64 base = (saddr ? w.pair(saddr->index) : 0) + (u64)(i64)I.mods.offset;
  const u32* low = w.v[vaddr.index];
  if (saddr) FOR_LANES a.at[lane] = base + low[lane];
  else {
    const u32* high = w.v[vaddr.index + 1];
    FOR_LANES a.at[lane] = base + join(low[lane], high[lane]);
  }
  a.present = a.active = w.exec();
  if (w.tainted.meets(I.reads)) {
    require_defined(w, I, first, vaddr.count, w.exec(), "address");
    if (saddr) require_defined(w, I, (int)(saddr - I.args), 2, w.exec(), "address");
  }
}

void buffer_addresses(Wave& w, const Ins& I, int first, int bytes, Addresses& a) {
  const Arg &vaddr = I.args[first], &resource = I.args[first + 1], &soffset = I.args[first + 2];
  const u32* d = &w.s[resource.index];
  u64 base = d[0] | (u64)(d[1] & 0xffff) << 32, limit = d[2];
  u32 stride = d[1] >> 16 & 0x3fff, scalar_offset = scalar(w, soffset);
  u64 exec = w.exec();
  a.present = 0;
  a.active = exec;
  const u32* index = w.v[vaddr.index];
  const u32* byte = w.v[vaddr.index + (I.mods.idxen ? 1 : 0)];
  FOR_LANES {
    u64 offset = (u64)(I.mods.offen ? byte[lane] : 0) + (u64)(u32)I.mods.offset;
    u64 record = I.mods.idxen ? index[lane] : 0;
    a.at[lane] = base + offset + record * stride + scalar_offset;
    bool within = stride ? record < limit : offset + bytes <= limit;
    a.present |= (u64)within << lane;
  }
  a.present &= exec;
  if (w.tainted.meets(I.reads)) {
    if (vaddr.kind == ARG_VGPR) require_defined(w, I, first, vaddr.count, exec, "address");
    require_defined(w, I, first + 1, 4, exec, "buffer resource");
    require_defined(w, I, first + 2, 1, exec, "address");
  }
}

}  // namespace cdnasim
