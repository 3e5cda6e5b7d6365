// LDS: ds_read, ds_write, atomics, and the ds_* instructions that only permute lanes.
#include "lds_shadow.hpp"
#include "memory.hpp"

namespace cdnasim {

void report_race(Wave& w, const Ins& I, int lane, u32 offset, int bytes, bool writing) {
  if (!(w.group->launch->checks & CHECK_RACES)) return;
  LdsShadow& shadow = *w.group->shadow;
  u32 tag = shadow_tag(w);
  for (u32 at = offset; at < offset + (u32)bytes; at++) {
    bool written = foreign(shadow.written[at], tag);
    if (!written && !(writing && foreign(shadow.read[at], tag))) continue;
    u32 other = (written ? shadow.written[at] : shadow.read[at]) & SHADOW_WAVE;
    char name[24];
    if (other == SHADOW_SEVERAL) snprintf(name, sizeof name, "several waves");
    else snprintf(name, sizeof name, "wave %u", other);
    report(w, I, LDS_RACE, lane, -1, "wave %u %s lds[%u] that %s %s since the last barrier",
           w.index, writing ? "writes" : "reads", at, name, written ? "wrote" : "read");
    return;
  }
}

bool stores_what_is_there(Wave& w, const StoredData& data, int lane, u32 offset, int bytes) {
  if (!data.from) return false;
  u32 words[4];
  for (int d = 0; d < (data.shape->dwords ? data.shape->dwords : 1); d++)
    words[d] = w.v[data.from->index + d][lane] >> (data.shape->half == 2 ? 16 : 0);
  return !memcmp(w.group->lds + offset, (const u8*)words + data.skip, bytes);
}

void check_dma(Wave& w, const Ins& I, int lane, u32 offset, int bytes) {
  LdsShadow& shadow = *w.group->shadow;
  for (u32 i = offset / 4; i <= (offset + bytes - 1) / 4; i++) {
    u8& owner = shadow.dma_wave[i];
    if (!owner) continue;
    Wave& from = *w.group->waves[owner - 1];
    bool mine = from.index == w.index;
    if (shadow.dma_sequence[i] <= (mine ? from.vm_done : from.vm_done_at_barrier)) {
      owner = 0;
      continue;
    }
    if (I.mods.lds || (I.flags & LDS_DMA_ONLY)) continue;
    report(w, I, MISSING_WAIT, lane, -1,
           "lds[%u] is used while wave %u's direct-to-LDS load into it is outstanding (s_waitcnt "
           "vmcnt%s)",
           4 * i, from.index, mine ? "" : " before the barrier");
    owner = 0;
  }
}

// Lane addresses of argument k plus an immediate; lanes out of bounds are dropped with a finding.
static void lds_addresses(Wave& w, const Ins& I, int k, u32 immediate, int bytes, Addresses& a) {
  const u32* base = w.v[I.args[k].index];
  u64 size = w.group->launch->lds_bytes;
  a.present = a.active = w.exec();
  if (w.tainted.has(I.args[k].index)) require_defined(w, I, k, 1, w.exec(), "LDS address");
  u32 highest = 0;
  FOR_LANES {
    a.at[lane] = (u64)w.group->lds + base[lane] + immediate;
    highest = base[lane] > highest ? base[lane] : highest;
  }
  if ((u64)highest + immediate + bytes <= size) return;
  for (u64 left = a.active; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    u64 offset = (u64)base[lane] + immediate;
    if (offset + bytes <= size) continue;
    a.present &= ~(1ull << lane);
    report(w, I, OUT_OF_BOUNDS, lane, -1, "LDS %s of lds[%llu..%llu), the workgroup has %llu bytes",
           I.flags & STORES ? "write" : "read", (unsigned long long)offset,
           (unsigned long long)offset + bytes, (unsigned long long)size);
  }
}
// Pass every lane's access through the shadow; returns the lanes that read undefined bytes.
template <bool WRITES, int BYTES>
static u64 note_lanes(Wave& w, const Ins& I, const Addresses& a, u64 undefined,
                      const StoredData& data) {
  u64 result = 0;
  if (!WRITES && BYTES != 12 && a.present == ~0ull) {  // without a branch a lane
    FOR_LANES result |= (u64)shadow_read<BYTES == 12 ? 8 : BYTES>(
                            w, I, lane, (u32)(a.at[lane] - (u64)w.group->lds))
                        << lane;
    return result;
  }
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    u32 offset = (u32)(a.at[lane] - (u64)w.group->lds);
    bool spoilt = undefined >> lane & 1;
    if constexpr (BYTES == 12) {  // the vectors below hold powers of two
      if (WRITES)
        shadow_write<8>(w, I, lane, offset, spoilt, data),
            shadow_write<4>(w, I, lane, offset + 8, spoilt, {data.from, data.shape, 8});
      else
        result |= (u64)(shadow_read<8>(w, I, lane, offset) | shadow_read<4>(w, I, lane, offset + 8))
                  << lane;
    } else {
      if (WRITES) shadow_write<BYTES>(w, I, lane, offset, spoilt, data);
      else result |= (u64)shadow_read<BYTES>(w, I, lane, offset) << lane;
    }
  }
  return result;
}
template <bool WRITES>
static u64 note_access(Wave& w, const Ins& I, const Addresses& a, int bytes, u64 undefined = 0,
                       const StoredData& data = {}) {
  i32 checks = w.group->launch->checks;
  if (!(checks & (CHECK_RACES | CHECK_UNDEFINED))) return 0;
  u64 relevant = checks & CHECK_UNDEFINED ? ~0ull : 0;
  switch (bytes) {
    case 1: return relevant & note_lanes<WRITES, 1>(w, I, a, undefined, data);
    case 2: return relevant & note_lanes<WRITES, 2>(w, I, a, undefined, data);
    case 4: return relevant & note_lanes<WRITES, 4>(w, I, a, undefined, data);
    case 8: return relevant & note_lanes<WRITES, 8>(w, I, a, undefined, data);
    case 12: return relevant & note_lanes<WRITES, 12>(w, I, a, undefined, data);
    default: return relevant & note_lanes<WRITES, 16>(w, I, a, undefined, data);
  }
}
static void read_part(Wave& w, const Ins& I, const Arg& to, u32 immediate, const Shape& s) {
  Addresses a;
  lds_addresses(w, I, 1, immediate, access_bytes(s), a);
  u64 undefined = note_access<false>(w, I, a, access_bytes(s));
  load_lanes(w, to, s, a);
  settle_load(w, I, to, s, a.active, undefined);
}
static void write_part(Wave& w, const Ins& I, const Arg& from, u32 immediate, const Shape& s) {
  Addresses a;
  lds_addresses(w, I, 0, immediate, access_bytes(s), a);
  u64 undefined = w.tainted.meets(I.reads) ? undefined_data(w, from, s, a.present) : 0;
  note_access<true>(w, I, a, access_bytes(s), undefined, {&from, &s, 0});
  store_lanes(w, from, s, a);
}
static void ds_read(Wave& w, const Ins& I) {
  read_part(w, I, I.args[0], I.mods.offset, I.op->shape);
}
static void ds_write(Wave& w, const Ins& I) {
  write_part(w, I, I.args[1], I.mods.offset, I.op->shape);
}

// ds_read2 / ds_write2: two accesses with offsets in elements, or in 64 elements (st64). The
// address is read first: the destination may overlap it.
template <int STRIDE>
static void ds_read2(Wave& w, const Ins& I) {
  const Shape& s = I.op->shape;
  int unit = access_bytes(s) * STRIDE;
  Addresses first, second;
  lds_addresses(w, I, 1, I.mods.offset * unit, access_bytes(s), first);
  lds_addresses(w, I, 1, I.mods.offset1 * unit, access_bytes(s), second);
  u64 undefined0 = note_access<false>(w, I, first, access_bytes(s));
  u64 undefined1 = note_access<false>(w, I, second, access_bytes(s));
  Arg low = I.args[0], high = I.args[0];
  high.index += s.dwords;
  load_lanes(w, low, s, first);
  load_lanes(w, high, s, second);
  settle_load(w, I, low, s, first.active, undefined0);
  settle_load(w, I, high, s, second.active, undefined1);
}
template <int STRIDE>
static void ds_write2(Wave& w, const Ins& I) {
  int unit = access_bytes(I.op->shape) * STRIDE;
  write_part(w, I, I.args[1], I.mods.offset * unit, I.op->shape);
  write_part(w, I, I.args[2], I.mods.offset1 * unit, I.op->shape);
}

// ---- atomics. Other waves may touch the same dword: that is their purpose, so no race check.
enum LdsAtomic {
  ADD_U32,
  SUB_U32,
  MIN_I32,
  MAX_I32,
  MIN_U32,
  MAX_U32,
  AND_B32,
  OR_B32,
  XOR_B32,
  ADD_F32,
  MIN_F32,
  MAX_F32,
  EXCHANGE
};
static u32 combine(int kind, u32 old, u32 x) {
  switch (kind) {
    case ADD_U32: return old + x;
    case SUB_U32: return old - x;
    case MIN_I32: return (i32)x < (i32)old ? x : old;
    case MAX_I32: return (i32)x > (i32)old ? x : old;
    case MIN_U32: return x < old ? x : old;
    case MAX_U32: return x > old ? x : old;
    case AND_B32: return old & x;
    case OR_B32: return old | x;
    case XOR_B32: return old ^ x;
    case ADD_F32: return as_bits(as_float(old) + as_float(x));
    case MIN_F32: return as_bits(min_f32(as_float(old), as_float(x)));
    case MAX_F32: return as_bits(max_f32(as_float(old), as_float(x)));
    default: return x;
  }
}
static void lds_atomic(Wave& w, const Ins& I, bool returns) {
  int address = returns ? 1 : 0, data = I.args[address + 1].index;
  Addresses a;
  lds_addresses(w, I, address, I.mods.offset, 4, a);
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    u32* p = (u32*)a.at[lane];
    u32 old = *p, offset = (u32)(a.at[lane] - (u64)w.group->lds);
    if (!w.group->shadow->written[offset] && (w.group->launch->checks & CHECK_UNDEFINED)) {
      report(w, I, UNDEFINED_VALUE, lane, -1, "atomic on lds[%u], which was never written", offset);
      for (int i = 0; i < 4; i++) w.group->shadow->written[offset + i] = (Entry)shadow_tag(w);
    }
    *p = combine(I.op->shape.half, old, w.v[data][lane]);
    if (returns) w.v[I.args[0].index][lane] = old;
  }
  if (returns) settle_load(w, I, I.args[0], {1, 4, false, 0}, a.present, 0);
}
static void ds_atomic(Wave& w, const Ins& I) { lds_atomic(w, I, false); }
static void ds_atomic_return(Wave& w, const Ins& I) { lds_atomic(w, I, true); }

// ---- lane permutations through the LDS crossbar; inactive source lanes give zero
static void permute(Wave& w, const Ins& I, const u32* from, const u32* undefined,
                    const int* source_lane) {
  Lanes r, t;
  u64 exec = w.exec();
  FOR_LANES {
    int s = source_lane[lane];
    bool valid = s >= 0 && exec >> s & 1;
    r.at[lane] = valid ? from[s] : 0;
    t.at[lane] = valid ? undefined[s] : 0;
  }
  blend(w, w.v[I.args[0].index], r.at);
  if (w.tainted.meets(I.reads) || w.tainted.has(I.args[0].index)) finish_undefined(w, I, t);
}
OP(ds_bpermute_b32, LDS | LOADS, 1, nullptr) {
  int from[LANES];
  FOR_LANES from[lane] = (w.v[I.args[1].index][lane] + I.mods.offset) / 4 & 63;
  permute(w, I, w.v[I.args[2].index], w.undefined[I.args[2].index], from);
}
OP(ds_permute_b32, LDS | LOADS, 1, nullptr) {
  int from[LANES];
  FOR_LANES from[lane] = -1;
  FOR_LANES if (w.exec() >> lane & 1) from[(w.v[I.args[1].index][lane] + I.mods.offset) / 4 & 63] =
      lane;
  permute(w, I, w.v[I.args[2].index], w.undefined[I.args[2].index], from);
}
OP(ds_swizzle_b32, LDS | LOADS, 1, nullptr) {
  int from[LANES], o = I.mods.offset;
  FOR_LANES {
    if (o & 0x8000) from[lane] = (lane & ~3) | (o >> 2 * (lane & 3) & 3);  // quad permute
    else from[lane] = (lane & 32) | ((((lane & 31) & (o & 31)) | (o >> 5 & 31)) ^ (o >> 10 & 31));
  }
  permute(w, I, w.v[I.args[1].index], w.undefined[I.args[1].index], from);
}

// ---- gfx950 transposing reads: sixteen lanes read a tile of 16-bit, 8-bit or 4-bit elements and
// each receives a column. For elements of `BITS` bits a lane gets 64 / BITS elements; element e of
// lane q comes from the row that lane (e * lanes_per_row + q / per_row) addressed.
template <int BITS>
static void ds_read_transposed(Wave& w, const Ins& I) {
  constexpr int PER_LANE = 64 / BITS, STEP = 16 / PER_LANE;
  Addresses a;
  lds_addresses(w, I, 1, I.mods.offset, 8, a);
  u64 undefined = note_access<false>(w, I, a, 8), spoilt = 0;
  Lanes64 words = {}, out = {};
  FOR_LANES if (a.present >> lane & 1) memcpy(&words.at[lane], (const void*)a.at[lane], 8);
  FOR_LANES {
    int base = lane & ~15, q = lane & 15;
    for (int e = 0; e < PER_LANE; e++) {
      int from = base + (e * STEP + q / PER_LANE) % 16, column = q % PER_LANE;
      u64 element = words.at[from] >> BITS * column & ((1ull << BITS) - 1);
      out.at[lane] |= element << BITS * e;
      spoilt |= (undefined >> from & 1) << lane;
    }
  }
  finish64(w, I, out);
  settle_load(w, I, I.args[0], I.op->shape, a.active, spoilt);
}

static int register_lds() {
  struct Named {
    const char* suffix;
    Shape shape;
  };
  const Named reads[] = {{"b32", {1, 4, false, 0}},     {"b64", {2, 8, false, 0}},
                         {"b96", {3, 12, false, 0}},    {"b128", {4, 16, false, 0}},
                         {"u8", {0, 1, false, 0}},      {"i8", {0, 1, true, 0}},
                         {"u16", {0, 2, false, 0}},     {"i16", {0, 2, true, 0}},
                         {"u8_d16", {0, 1, false, 1}},  {"u8_d16_hi", {0, 1, false, 2}},
                         {"i8_d16", {0, 1, true, 1}},   {"i8_d16_hi", {0, 1, true, 2}},
                         {"u16_d16", {0, 2, false, 1}}, {"u16_d16_hi", {0, 2, false, 2}}};
  const Named writes[] = {{"b32", {1, 4, false, 0}},  {"b64", {2, 8, false, 0}},
                          {"b96", {3, 12, false, 0}}, {"b128", {4, 16, false, 0}},
                          {"b8", {0, 1, false, 0}},   {"b8_d16_hi", {0, 1, false, 2}},
                          {"b16", {0, 2, false, 0}},  {"b16_d16_hi", {0, 2, false, 2}}};
  for (const Named& n : reads)
    add_op({std::string("ds_read_") + n.suffix, LDS | LOADS | (n.shape.half ? (u64)READS_DST : 0),
            ds_read, nullptr, 1, n.shape, 0});
  for (const Named& n : writes)
    add_op({std::string("ds_write_") + n.suffix, LDS | STORES, ds_write, nullptr, 0, n.shape, 0});
  for (int i = 0; i < 2; i++) {
    std::string bits = i ? "b64" : "b32";
    Shape s = reads[i].shape;
    add_op({"ds_read2_" + bits, LDS | LOADS, ds_read2<1>, nullptr, 1, s, 0});
    add_op({"ds_read2st64_" + bits, LDS | LOADS, ds_read2<64>, nullptr, 1, s, 0});
    add_op({"ds_write2_" + bits, LDS | STORES, ds_write2<1>, nullptr, 0, s, 0});
    add_op({"ds_write2st64_" + bits, LDS | STORES, ds_write2<64>, nullptr, 0, s, 0});
  }
  add_op(
      {"ds_read_b64_tr_b16", LDS | LOADS, ds_read_transposed<16>, nullptr, 1, {2, 8, false, 0}, 0});
  add_op(
      {"ds_read_b64_tr_b8", LDS | LOADS, ds_read_transposed<8>, nullptr, 1, {2, 8, false, 0}, 0});
  add_op(
      {"ds_read_b64_tr_b4", LDS | LOADS, ds_read_transposed<4>, nullptr, 1, {2, 8, false, 0}, 0});
  const char* atomics[] = {"add_%su32", "sub_%su32", "min_%si32",   "max_%si32", "min_%su32",
                           "max_%su32", "and_%sb32", "or_%sb32",    "xor_%sb32", "add_%sf32",
                           "min_%sf32", "max_%sf32", "wrxchg_%sb32"};
  for (int kind = 0; kind < 13; kind++) {
    char name[40] = "ds_";
    Shape s = {1, 4, false, (i8)kind};
    snprintf(name + 3, 30, atomics[kind], "");
    if (kind != EXCHANGE) add_op({name, LDS | STORES | ATOMIC, ds_atomic, nullptr, 0, s, 0});
    snprintf(name + 3, 30, atomics[kind], "rtn_");
    add_op({name, LDS | LOADS | ATOMIC, ds_atomic_return, nullptr, 1, s, 0});
  }
  return 0;
}
static int registered_lds = register_lds();

}  // namespace cdnasim
