// global_*, flat_*, buffer_*, scratch_* and scalar loads. All return data in program order; the
// s_waitcnt model in waits.cpp decides when it may be used.
#include "memory.hpp"
#include "lds_shadow.hpp"

namespace cdnasim {

// A store to memory that outlives the kernel must store defined bits.
static void store_defined(Wave& w, const Ins& I, const Arg& data, const Addresses& a) {
  if (!w.tainted.meets(I.reads)) return;
  u64 bad = undefined_data(w, data, I.op->shape, a.present);
  if (!bad) return;
  int reg = data.index;
  for (int d = data.count - 1; d >= 0; d--)
    if (w.tainted.has(data.index + d)) reg = data.index + d;
  report(w, I, UNDEFINED_VALUE, __builtin_ctzll(bad), origin_pc(w, reg),
         "stores an undefined value from %s%s", register_name(reg).c_str(),
         origin_text(w, reg).c_str());
}

// ---- global and flat
static void global_load(Wave& w, const Ins& I) {
  Addresses a;
  global_addresses(w, I, 1, a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  load_lanes(w, I.args[0], I.op->shape, a);
  settle_load(w, I, I.args[0], I.op->shape, a.active, 0);
}
static void global_store(Wave& w, const Ins& I) {
  Addresses a;
  global_addresses(w, I, 0, a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  store_defined(w, I, I.args[1], a);
  store_lanes(w, I.args[1], I.op->shape, a);
}

// ---- buffer
static void buffer_load(Wave& w, const Ins& I) {
  Addresses a;
  buffer_addresses(w, I, 1, access_bytes(I.op->shape), a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  load_lanes(w, I.args[0], I.op->shape, a);
  settle_load(w, I, I.args[0], I.op->shape, a.active, 0);
}
static void buffer_store(Wave& w, const Ins& I) {
  Addresses a;
  buffer_addresses(w, I, 1, access_bytes(I.op->shape), a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  store_defined(w, I, I.args[0], a);
  store_lanes(w, I.args[0], I.op->shape, a);
}

// ---- direct to LDS: the wave's lanes land in consecutive elements from M0 plus the offset
static void to_lds(Wave& w, const Ins& I, const Addresses& a, u32 base) {
  int bytes = access_bytes(I.op->shape), unit = bytes < 4 ? 4 : bytes;
  LdsShadow& shadow = *w.group->shadow;
  for (u64 left = a.active; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    u32 to = base + lane * unit;
    if ((u64)to + unit > (u64)w.group->launch->lds_bytes) {
      report(w, I, OUT_OF_BOUNDS, lane, -1, "direct-to-LDS load writes lds[%u..%u) of %d bytes", to,
             to + unit, w.group->launch->lds_bytes);
      continue;
    }
    memset(w.group->lds + to, 0, unit);
    if (a.present >> lane & 1) memcpy(w.group->lds + to, (const void*)a.at[lane], bytes);
    for (int i = 0; i < unit; i += 4) {
      shadow_write<4>(w, I, lane, to + i, false, {});
      shadow.dma_sequence[(to + i) / 4] = w.vm_issued;
      shadow.dma_wave[(to + i) / 4] = (u8)(w.index + 1);
    }
  }
  shadow.any_dma = true;
}
static void buffer_load_lds(Wave& w, const Ins& I) {
  Addresses a;
  buffer_addresses(w, I, 0, access_bytes(I.op->shape), a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  to_lds(w, I, a, (w.s[M0] & 0xffff) + (u32)I.mods.offset);
}
static void global_load_lds(Wave& w, const Ins& I) {
  Addresses a;
  global_addresses(w, I, 0, a);
  check_bounds(w, I, a, access_bytes(I.op->shape));
  to_lds(w, I, a, (w.s[M0] & 0xffff) + (u32)I.mods.offset);
}
static void buffer_load_any(Wave& w, const Ins& I) {
  if (I.mods.lds) buffer_load_lds(w, I);
  else buffer_load(w, I);
}

// ---- scratch: private to a lane; operands vaddr (or off) and saddr (or off)
static bool scratch_addresses(Wave& w, const Ins& I, int first, Addresses& a, u8* base) {
  int bytes = access_bytes(I.op->shape);
  i64 size = w.group->launch->scratch_bytes;
  const Arg* vaddr = I.args[first].kind == ARG_VGPR ? &I.args[first] : nullptr;
  const Arg* saddr = nullptr;
  for (int k = first; k < I.nargs; k++)
    if (I.args[k].kind == ARG_SGPR) saddr = &I.args[k];
  a.active = a.present = w.exec();
  FOR_LANES {
    if (!(a.active >> lane & 1)) continue;
    i64 at = (i64)I.mods.offset + (vaddr ? w.v[vaddr->index][lane] : 0) +
             (saddr ? (i32)w.s[saddr->index] : 0);
    if (at < 0 || at + bytes > size) {
      report(w, I, OUT_OF_BOUNDS, lane, -1, "scratch access at byte %lld of %lld", (long long)at,
             (long long)size);
      a.present &= ~(1ull << lane);
      continue;
    }
    a.at[lane] = (u64)(base + (size_t)lane * size + at);
  }
  return a.present != 0;
}
static void scratch_load(Wave& w, const Ins& I) {
  Addresses a;
  scratch_addresses(w, I, 1, a, w.scratch);
  load_lanes(w, I.args[0], I.op->shape, a);
  u64 undefined = 0;
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    const u8* mark = w.scratch_undefined + (a.at[lane] - (u64)w.scratch);
    for (int i = 0; i < access_bytes(I.op->shape); i++) undefined |= (u64)(mark[i] != 0) << lane;
  }
  settle_load(w, I, I.args[0], I.op->shape, a.active, undefined);
}
static void scratch_store(Wave& w, const Ins& I) {
  Addresses a;
  const Arg& data = I.args[1];
  scratch_addresses(w, I, 0, a, w.scratch);
  u64 undefined = w.tainted.meets(I.reads) ? undefined_data(w, data, I.op->shape, a.present) : 0;
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    memset(w.scratch_undefined + (a.at[lane] - (u64)w.scratch), undefined >> lane & 1,
           access_bytes(I.op->shape));
  }
  store_lanes(w, data, I.op->shape, a);
}

// ---- atomics on memory: real ones, because workgroups run on several threads
template <class T, class F>
static T update(void* address, F f) {
  T old, desired;
  __atomic_load((T*)address, &old, __ATOMIC_RELAXED);
  do {
    desired = f(old);
  } while (!__atomic_compare_exchange((T*)address, &old, &desired, true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED));
  return old;
}
enum Atomic {
  ADD,
  SUB,
  SMIN,
  UMIN,
  SMAX,
  UMAX,
  AND,
  OR,
  XOR,
  SWAP,
  CMPSWAP,
  INC,
  DEC,
  ADD_F32,
  PK_ADD_F16,
  PK_ADD_BF16,
  ADD_F64,
  MIN_F64,
  MAX_F64
};
template <class T, class S>
static T combine(Atomic kind, T old, T x, T compare) {
  switch (kind) {
    case ADD: return old + x;
    case SUB: return old - x;
    case SMIN: return (S)x < (S)old ? x : old;
    case UMIN: return x < old ? x : old;
    case SMAX: return (S)x > (S)old ? x : old;
    case UMAX: return x > old ? x : old;
    case AND: return old & x;
    case OR: return old | x;
    case XOR: return old ^ x;
    case SWAP: return x;
    case CMPSWAP: return old == compare ? x : old;
    case INC: return old >= x ? 0 : old + 1;
    case DEC: return old == 0 || old > x ? x : old - 1;
    default: return old;
  }
}
static u32 packed_add(u32 a, u32 b, bool bf16) {
  u32 r = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    u32 x = a >> shift & 0xffff, y = b >> shift & 0xffff;
    r |= (bf16 ? float_to_bf16(bf16_to_float(x) + bf16_to_float(y))
               : float_to_half(half_to_float(x) + half_to_float(y)))
         << shift;
  }
  return r;
}
static u32 combine32(Atomic kind, u32 old, u32 x, u32 compare) {
  if (kind == ADD_F32) return as_bits(as_float(old) + as_float(x));
  if (kind == PK_ADD_F16 || kind == PK_ADD_BF16) return packed_add(old, x, kind == PK_ADD_BF16);
  return combine<u32, i32>(kind, old, x, compare);
}
static u64 combine64(Atomic kind, u64 old, u64 x, u64 compare) {
  double a = as_double(old), b = as_double(x);
  if (kind == ADD_F64) return as_bits64(a + b);
  if (kind == MIN_F64) return as_bits64(fmin(a, b));
  if (kind == MAX_F64) return as_bits64(fmax(a, b));
  return combine<u64, i64>(kind, old, x, compare);
}
// shape.half holds the kind, shape.dwords the width of the memory word.
static void atomic(Wave& w, const Ins& I, int data, Addresses& a) {
  Atomic kind = (Atomic)I.op->shape.half;
  bool wide = I.op->shape.dwords == 2, returns = I.mods.returns;
  int reg = I.args[data].index, width = wide ? 2 : 1;
  check_bounds(w, I, a, 4 * width);
  if (w.tainted.meets(I.reads))
    require_defined(w, I, data, I.args[data].count, a.present, "operand");
  for (u64 left = a.present; left; left &= left - 1) {
    int lane = __builtin_ctzll(left);
    void* p = (void*)a.at[lane];
    auto word = [&](int i) {
      return wide ? join(w.v[reg + 2 * i][lane], w.v[reg + 2 * i + 1][lane]) : w.v[reg + i][lane];
    };
    u64 x = word(0), compare = kind == CMPSWAP ? word(1) : 0, old;
    if (wide) old = update<u64>(p, [&](u64 v) { return combine64(kind, v, x, compare); });
    else old = update<u32>(p, [&](u32 v) { return combine32(kind, v, (u32)x, (u32)compare); });
    if (!returns) continue;
    w.v[I.args[0].index][lane] = (u32)old;
    if (wide) w.v[I.args[0].index + 1][lane] = (u32)(old >> 32);
  }
  if (returns) settle_load(w, I, I.args[0], {(i8)width, (i8)(4 * width), false, 0}, a.present, 0);
}
// With sc0 the old value is returned to a first operand.
static void global_atomic(Wave& w, const Ins& I) {
  Addresses a;
  int first = I.mods.returns ? 1 : 0;
  global_addresses(w, I, first, a);
  atomic(w, I, first + 1, a);
}
static void buffer_atomic(Wave& w, const Ins& I) {
  Addresses a;
  buffer_addresses(w, I, 1, 4 * I.op->shape.dwords, a);
  atomic(w, I, 0, a);
}
struct NamedAtomic {
  const char* name;
  Atomic kind;
  i8 dwords;
};
static const NamedAtomic ATOMICS[] = {
    {"add", ADD, 1},
    {"sub", SUB, 1},
    {"smin", SMIN, 1},
    {"umin", UMIN, 1},
    {"smax", SMAX, 1},
    {"umax", UMAX, 1},
    {"and", AND, 1},
    {"or", OR, 1},
    {"xor", XOR, 1},
    {"swap", SWAP, 1},
    {"cmpswap", CMPSWAP, 1},
    {"inc", INC, 1},
    {"dec", DEC, 1},
    {"add_f32", ADD_F32, 1},
    {"pk_add_f16", PK_ADD_F16, 1},
    {"pk_add_bf16", PK_ADD_BF16, 1},
    {"add_f64", ADD_F64, 2},
    {"min_f64", MIN_F64, 2},
    {"max_f64", MAX_F64, 2},
    {"add_x2", ADD, 2},
    {"sub_x2", SUB, 2},
    {"umin_x2", UMIN, 2},
    {"umax_x2", UMAX, 2},
    {"smin_x2", SMIN, 2},
    {"smax_x2", SMAX, 2},
    {"and_x2", AND, 2},
    {"or_x2", OR, 2},
    {"xor_x2", XOR, 2},
    {"swap_x2", SWAP, 2},
    {"cmpswap_x2", CMPSWAP, 2},
};

// ---- scalar loads
static void scalar_load(Wave& w, const Ins& I) {
  const Arg& offset = I.args[2];
  int dwords = I.op->shape.dwords;
  u64 address = w.pair(I.args[1].index) + (u64)(i64)I.mods.offset;
  if (offset.kind == ARG_SGPR) address += w.s[offset.index];
  if (offset.kind == ARG_LITERAL) address += (u64)(i64)offset.value;
  address &= ~3ull;
  if (w.tainted.meets(I.reads)) require_defined(w, I, 1, 2, 1, "address");
  for (int d = 0; d < dwords; d++) set_scalar_undefined(w, I, I.args[0].index + d, 0);
  if (in_bounds(w, address, 4 * dwords))
    memcpy(&w.s[I.args[0].index], (const void*)address, 4 * dwords);
  else
    report(w, I, OUT_OF_BOUNDS, -1, -1, "scalar read of %d bytes at %#llx, outside every buffer",
           4 * dwords, (unsigned long long)address);
}
static void scalar_buffer_load(Wave& w, const Ins& I) {
  const Arg& offset = I.args[2];
  const u32* d = &w.s[I.args[1].index];
  u64 base = d[0] | (u64)(d[1] & 0xffff) << 32;
  u64 at = ((offset.kind == ARG_SGPR ? w.s[offset.index] : (u32)offset.value) +
            (u64)(i64)I.mods.offset) &
           ~3ull;
  for (int i = 0; i < I.op->shape.dwords; i++) {
    u64 address = base + at + 4 * i;
    u32 value = 0;
    if (at + 4 * i + 4 <= d[2]) {
      if (in_bounds(w, address, 4)) memcpy(&value, (const void*)address, 4);
      else
        report(w, I, OUT_OF_BOUNDS, -1, -1, "scalar buffer read at %#llx, outside every buffer",
               (unsigned long long)address);
    }
    w.s[I.args[0].index + i] = value;
    set_scalar_undefined(w, I, I.args[0].index + i, 0);
  }
}
static void read_clock(Wave& w, const Ins& I, u64 cycles_per_4_instructions) {
  set_scalar64(w, I.args[0], w.executed * cycles_per_4_instructions / 4);
  set_scalar64_undefined(w, I, I.args[0].index, 0);
}
OP(s_memtime, SMEM | LOADS, 1, nullptr) { read_clock(w, I, 16); }
OP(s_memrealtime, SMEM | LOADS, 1, nullptr) { read_clock(w, I, 1); }

static int register_memory() {
  auto kept = [](const Shape& s) { return s.half ? (u64)READS_DST : 0; };
  for (const NamedShape& n : LOAD_SHAPES) {
    std::string s = n.suffix;
    u64 flags = VMEM | LOADS | kept(n.shape);
    add_op({"global_load_" + s, flags, global_load, nullptr, 1, n.shape, 0});
    add_op({"flat_load_" + s, flags, global_load, nullptr, 1, n.shape, 0});
    add_op({"buffer_load_" + s, flags, buffer_load_any, nullptr, 1, n.shape, 0});
    add_op({"scratch_load_" + s, flags, scratch_load, nullptr, 1, n.shape, 0});
    bool direct = n.shape.half == 0 && n.shape.dwords != 2;
    if (direct)
      add_op({"global_load_lds_" + s, VMEM | LOADS | READS_M0 | LDS_DMA_ONLY, global_load_lds,
              nullptr, 0, n.shape, 0});
  }
  for (const NamedShape& n : STORE_SHAPES) {
    std::string s = n.suffix;
    add_op({"global_store_" + s, VMEM | STORES, global_store, nullptr, 0, n.shape, 0});
    add_op({"flat_store_" + s, VMEM | STORES, global_store, nullptr, 0, n.shape, 0});
    add_op({"buffer_store_" + s, VMEM | STORES, buffer_store, nullptr, 0, n.shape, 0});
    add_op({"scratch_store_" + s, VMEM | STORES, scratch_store, nullptr, 0, n.shape, 0});
  }
  for (const NamedAtomic& n : ATOMICS) {
    Shape shape = {n.dwords, (i8)(4 * n.dwords), false, (i8)n.kind};
    u64 flags = VMEM | STORES | ATOMIC;
    add_op({std::string("global_atomic_") + n.name, flags, global_atomic, nullptr, 0, shape, 0});
    add_op({std::string("flat_atomic_") + n.name, flags, global_atomic, nullptr, 0, shape, 0});
    add_op({std::string("buffer_atomic_") + n.name, flags, buffer_atomic, nullptr, 0, shape, 0});
  }
  const i8 widths[] = {1, 2, 4, 8, 16};
  const char* names[] = {"dword", "dwordx2", "dwordx4", "dwordx8", "dwordx16"};
  for (int i = 0; i < 5; i++) {
    Shape shape = {widths[i], (i8)(4 * widths[i]), false, 0};
    add_op({std::string("s_load_") + names[i], SMEM | LOADS, scalar_load, nullptr, 1, shape, 0});
    add_op({std::string("s_buffer_load_") + names[i], SMEM | LOADS, scalar_buffer_load, nullptr, 1,
            shape, 0});
  }
  return 0;
}
static int registered_memory = register_memory();

}  // namespace cdnasim
