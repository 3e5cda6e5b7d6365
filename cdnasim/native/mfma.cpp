// Matrix instructions: D[M][M] = A[M][K] * B[K][M] + C, for one or several independent blocks.
//
// Layout, per AMD's matrix instruction calculator, with lane = 0..63:
//   A, B  row (column) lane % M; the lane's elements hold k = group * elements + j, where
//         group = lane / M (one block) and block = lane / M (several blocks).
//   C, D  column lane % M. Register r holds row 8*(r/4) + 4*(lane/32) + r%4 for M = 32,
//         4*(lane/16) + r for M = 16, and r for M = 4, where block = lane / 4.
// Accumulation runs over k in order with one rounding per step; the hardware's order and
// intermediate precision are not documented. EXEC is ignored.
#include <algorithm>

#include "operands.hpp"
#ifdef __SSE__
#include <immintrin.h>
#endif

namespace cdnasim {

enum Element { EL_F32, EL_XF32, EL_F16, EL_BF16, EL_FP8, EL_BF8, EL_I8 };

struct Matrix {
  const char* name;
  int M, K, blocks;
  Element a, b;
  int passes;
};

static const Matrix MATRICES[] = {
    {"v_mfma_f32_32x32x2_f32", 32, 2, 1, EL_F32, EL_F32, 16},
    {"v_mfma_f32_16x16x4_f32", 16, 4, 1, EL_F32, EL_F32, 8},
    {"v_mfma_f32_32x32x1_2b_f32", 32, 1, 2, EL_F32, EL_F32, 16},
    {"v_mfma_f32_16x16x1_4b_f32", 16, 1, 4, EL_F32, EL_F32, 8},
    {"v_mfma_f32_4x4x1_16b_f32", 4, 1, 16, EL_F32, EL_F32, 2},
    {"v_mfma_f32_16x16x8_xf32", 16, 8, 1, EL_XF32, EL_XF32, 4},
    {"v_mfma_f32_32x32x4_xf32", 32, 4, 1, EL_XF32, EL_XF32, 8},
    {"v_mfma_f32_16x16x16_f16", 16, 16, 1, EL_F16, EL_F16, 4},
    {"v_mfma_f32_32x32x8_f16", 32, 8, 1, EL_F16, EL_F16, 8},
    {"v_mfma_f32_32x32x4_2b_f16", 32, 4, 2, EL_F16, EL_F16, 16},
    {"v_mfma_f32_16x16x4_4b_f16", 16, 4, 4, EL_F16, EL_F16, 8},
    {"v_mfma_f32_4x4x4_16b_f16", 4, 4, 16, EL_F16, EL_F16, 2},
    {"v_mfma_f32_16x16x16_bf16", 16, 16, 1, EL_BF16, EL_BF16, 4},
    {"v_mfma_f32_32x32x8_bf16", 32, 8, 1, EL_BF16, EL_BF16, 8},
    {"v_mfma_f32_32x32x4_2b_bf16", 32, 4, 2, EL_BF16, EL_BF16, 16},
    {"v_mfma_f32_16x16x4_4b_bf16", 16, 4, 4, EL_BF16, EL_BF16, 8},
    {"v_mfma_f32_4x4x4_16b_bf16", 4, 4, 16, EL_BF16, EL_BF16, 2},
    {"v_mfma_f32_16x16x32_f16", 16, 32, 1, EL_F16, EL_F16, 4},
    {"v_mfma_f32_32x32x16_f16", 32, 16, 1, EL_F16, EL_F16, 8},
    {"v_mfma_f32_16x16x32_bf16", 16, 32, 1, EL_BF16, EL_BF16, 4},
    {"v_mfma_f32_32x32x16_bf16", 32, 16, 1, EL_BF16, EL_BF16, 8},
    {"v_mfma_f32_16x16x32_fp8_fp8", 16, 32, 1, EL_FP8, EL_FP8, 4},
    {"v_mfma_f32_16x16x32_fp8_bf8", 16, 32, 1, EL_FP8, EL_BF8, 4},
    {"v_mfma_f32_16x16x32_bf8_fp8", 16, 32, 1, EL_BF8, EL_FP8, 4},
    {"v_mfma_f32_16x16x32_bf8_bf8", 16, 32, 1, EL_BF8, EL_BF8, 4},
    {"v_mfma_f32_32x32x16_fp8_fp8", 32, 16, 1, EL_FP8, EL_FP8, 8},
    {"v_mfma_f32_32x32x16_fp8_bf8", 32, 16, 1, EL_FP8, EL_BF8, 8},
    {"v_mfma_f32_32x32x16_bf8_fp8", 32, 16, 1, EL_BF8, EL_FP8, 8},
    {"v_mfma_f32_32x32x16_bf8_bf8", 32, 16, 1, EL_BF8, EL_BF8, 8},
    {"v_mfma_i32_16x16x32_i8", 16, 32, 1, EL_I8, EL_I8, 4},
    {"v_mfma_i32_32x32x16_i8", 32, 16, 1, EL_I8, EL_I8, 8},
    {"v_mfma_i32_16x16x64_i8", 16, 64, 1, EL_I8, EL_I8, 4},
    {"v_mfma_i32_32x32x32_i8", 32, 32, 1, EL_I8, EL_I8, 8},
};
// Microscaling forms of gfx950: operand formats come from cbsz and blgp.
static const Matrix SCALED_MATRICES[] = {
    {"v_mfma_f32_16x16x128_f8f6f4", 16, 128, 1, EL_FP8, EL_FP8, 8},
    {"v_mfma_f32_32x32x64_f8f6f4", 32, 64, 1, EL_FP8, EL_FP8, 16},
    {"v_mfma_scale_f32_16x16x128_f8f6f4", 16, 128, 1, EL_FP8, EL_FP8, 8},
    {"v_mfma_scale_f32_32x32x64_f8f6f4", 32, 64, 1, EL_FP8, EL_FP8, 16},
};

// MFMA handles denormals whatever MODE says.
struct FullPrecision {
#ifdef __SSE__
  u32 saved = _mm_getcsr();
  FullPrecision() {
    if (saved & 0x8040) _mm_setcsr(saved & ~0x8040u);
  }
  ~FullPrecision() {
    if (saved & 0x8040) _mm_setcsr(saved);
  }
#endif
};

// A row of M elements; sizes known to the compiler become a few vector moves.
static inline void copy_row(int M, void* to, const void* from) {
  if (M == 32) memcpy(to, from, 128);
  else if (M == 16) memcpy(to, from, 64);
  else memcpy(to, from, 16);
}

static int row_of(int M, int reg, int lane) {
  return M == 32   ? 8 * (reg / 4) + 4 * (lane / 32) + reg % 4
         : M == 16 ? 4 * (lane / 16) + reg
                   : reg;
}

// ---- unpacking: one register's worth of 64 lanes at a time, element by element
template <int FLAVOUR>
static void decode_fp8(const u32* words, int shift, float* out) {
  constexpr bool FNUZ = FLAVOUR == E4M3_FNUZ || FLAVOUR == E5M2_FNUZ;
  constexpr u32 NAN_FROM = FLAVOUR == E4M3_OCP ? 0x7f : FLAVOUR == E5M2_OCP ? 0x7d : 0x80;
  Fp8Format f = fp8_format(FLAVOUR);
  float scale = as_float((u32)(254 - f.bias) << 23);
  int up = 23 - f.mantissa_bits;
  FOR_LANES {
    u32 x = words[lane] >> shift & 255, magnitude = x & 127, sign = (x & 128) << 24;
    u32 bits = as_bits(as_float(magnitude << up) * scale) | sign;
    if constexpr (FNUZ) bits = x == 0x80 ? 0x7fc00000 : bits;
    else bits = magnitude >= NAN_FROM ? 0x7fc00000 : bits;
    if constexpr (FLAVOUR == E5M2_OCP) bits = magnitude == 0x7c ? 0x7f800000 | sign : bits;
    out[lane] = as_float(bits);
  }
}
static void decode_fp8(const u32* words, int shift, int flavour, float* out) {
  switch (flavour) {
    case E4M3_FNUZ: return decode_fp8<E4M3_FNUZ>(words, shift, out);
    case E5M2_FNUZ: return decode_fp8<E5M2_FNUZ>(words, shift, out);
    case E4M3_OCP: return decode_fp8<E4M3_OCP>(words, shift, out);
    default: return decode_fp8<E5M2_OCP>(words, shift, out);
  }
}
static void decode_element(Wave& w, Element type, const u32* const* regs, int j, float* out) {
  switch (type) {
    case EL_F32: FOR_LANES out[lane] = as_float(regs[j][lane]); return;
    case EL_XF32:
      FOR_LANES {
        u32 x = regs[j][lane];
        out[lane] = as_float((x + 0xfff + (x >> 13 & 1)) & 0xffffe000);
      }
      return;
    case EL_F16:
      FOR_LANES out[lane] = half_to_float(regs[j / 2][lane] >> 16 * (j & 1) & 0xffff);
      return;
    case EL_BF16:
      FOR_LANES out[lane] = bf16_to_float(regs[j / 2][lane] >> 16 * (j & 1) & 0xffff);
      return;
    case EL_FP8: decode_fp8(regs[j / 4], 8 * (j & 3), w.fp8_flavour(false), out); return;
    case EL_BF8: decode_fp8(regs[j / 4], 8 * (j & 3), w.fp8_flavour(true), out); return;
    case EL_I8: FOR_LANES out[lane] = (float)(i8)(regs[j / 4][lane] >> 8 * (j & 3)); return;
  }
}
static void unpack(Wave& w, const Arg& arg, const Matrix& m, Element type, float* tile) {
  const u32* regs[8];
  for (int r = 0; r < arg.count && r < 8; r++) regs[r] = w.v[arg.index + r];
  int elements = m.M * m.K * m.blocks / LANES;
  float values[LANES];
  for (int j = 0; j < elements; j++) {
    decode_element(w, type, regs, j, values);
    for (int group = 0; group < LANES / m.M; group++) {
      int k = m.blocks > 1 ? group * m.K + j : group * elements + j;
      copy_row(m.M, tile + k * m.M, values + group * m.M);
    }
  }
}

// Operands unpacked lately: the products of a tile of D use each of them several times.
struct Unpacked {
  const Matrix* matrix;
  Element type;
  int flavour, count;
  u32 words[8 * LANES];
  alignas(64) float tile[32 * 32];  // [k][row]: 16 x 64 or 32 x 32 numbers at most
};
struct Operands {
  static constexpr u32 NUM = 4;
  Unpacked entries[NUM];
  u32 next;

  const float* get(Wave& w, const Arg& arg, const Matrix& m, Element type) {
    const u32* words = w.v[arg.index];
    int flavour = w.fp8_flavour(type == EL_BF8);
    size_t bytes = sizeof w.v[0] * arg.count;
    for (Unpacked& e : entries)
      if (e.matrix == &m && e.type == type && e.flavour == flavour && e.count == arg.count &&
          !memcmp(e.words, words, bytes))
        return e.tile;
    Unpacked& e = entries[next++ % NUM];
    e.matrix = &m;
    e.type = type;
    e.flavour = flavour;
    e.count = arg.count;
    memcpy(e.words, words, bytes);
    unpack(w, arg, m, type, e.tile);
    return e.tile;
  }
};

// ---- the product of one block, in strips of 8 rows by 16 columns held in vector registers (the
// rows are written out because an array of them would live in memory)
typedef float Vec16 __attribute__((vector_size(64)));
typedef float Vec16Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
static void strip(const float* a, const float* b, int stride, int K, const float* const* from,
                  float* const* to, int column) {
#define LOAD(i) Vec16 sum##i = *(const Vec16Anywhere*)(from[i] + column);
#define STEP(i) sum##i += a[i] * row;
#define STORE(i) *(Vec16Anywhere*)(to[i] + column) = sum##i;
  ROWS(LOAD)
  for (int k = 0; k < K; k++, a += stride, b += stride) {
    Vec16 row = *(const Vec16Anywhere*)b;
    ROWS(STEP)
  }
  ROWS(STORE)
#undef LOAD
#undef STEP
#undef STORE
}
static void multiply(int M, int K, const float* a, const float* b, float* d) {
  if (M == 4) {
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        for (int k = 0; k < K; k++) d[i * 4 + j] += a[k * 4 + i] * b[k * 4 + j];
    return;
  }
  for (int i = 0; i < M; i += 8) {
    float* rows[8];
    for (int k = 0; k < 8; k++) rows[k] = d + (i + k) * M;
    for (int j = 0; j < M; j += 16) strip(a + i, b + j, M, K, rows, rows, j);
  }
}
// The same where C and D are register rows of one block, which need not be copied together.
static void multiply_registers(Wave& w, int M, int K, const float* a, const float* b, int c,
                               int out) {
  for (int i = 0; i < M; i += 8) {
    const float* from[8];
    float* to[8];
    for (int k = 0; k < 8; k++) {
      int reg = M == 32 ? i / 2 + k % 4 : k % 4, lane = M == 32 ? 32 * (k / 4) : 16 * ((i + k) / 4);
      from[k] = (const float*)&w.v[c + reg][lane];
      to[k] = (float*)&w.v[out + reg][lane];
    }
    for (int j = 0; j < M; j += 16) strip(a + i, b + j, M, K, from, to, j);
  }
}

// One register of 64 lanes holds whole runs of M columns; with M = 4, one run per block.
template <class F>
static void each_run(int M, int block, F f) {
  int count = M == 4 ? 4 : M * M / LANES;
  for (int r = 0; r < count; r++)
    for (int lane = M == 4 ? 4 * block : 0; lane < (M == 4 ? 4 * block + 4 : LANES); lane += M)
      f(r, lane, row_of(M, r, lane) * M);
}
static void load_accumulator(Wave& w, const Arg& c, int M, int first, int block, float* d) {
  each_run(M, block, [&](int r, int lane, int at) {
    if (c.kind == ARG_VGPR) copy_row(M, d + at, &w.v[c.index + first + r][lane]);
    else
      for (int i = 0; i < M; i++) d[at + i] = as_float((u32)c.value);
  });
}
static void store_accumulator(Wave& w, const Arg& out, int M, int first, int block,
                              const float* d) {
  each_run(M, block, [&](int r, int lane, int at) {
    copy_row(M, &w.v[out.index + first + r][lane], d + at);
  });
}
static void multiply_blocks(Wave& w, const Ins& I, const Matrix& m, const float* a,
                            const float* b) {
  alignas(64) float d[32 * 32];
  int registers = m.M == 4 ? 0 : m.M * m.M / LANES, c = I.args[3].index, first = I.args[0].index;
  bool apart = c == first || c + registers <= first || first + registers <= c;
  if (m.M != 4 && m.blocks == 1 && I.args[3].kind == ARG_VGPR && apart)
    return multiply_registers(w, m.M, m.K, a, b, c, first);
  // All of C is read before D is written: they may overlap.
  alignas(64) static thread_local float results[4][32 * 32];
  for (int block = 0; block < m.blocks; block++) {
    float* out = m.M == 4 ? d : results[block];
    load_accumulator(w, I.args[3], m.M, block * registers, block, out);
    multiply(m.M, m.K, a + block * m.K * m.M, b + block * m.K * m.M, out);
    if (m.M == 4) store_accumulator(w, I.args[0], 4, 0, block, d);
  }
  if (m.M != 4)
    for (int block = 0; block < m.blocks; block++)
      store_accumulator(w, I.args[0], m.M, block * registers, block, results[block]);
}

// i8: a sum of up to 64 products of 2^14 is exact in a float; the accumulator wraps.
static void multiply_integers(Wave& w, const Ins& I, const Matrix& m, const float* a,
                              const float* b) {
  const Arg &c = I.args[3], &out = I.args[0];
  alignas(64) static thread_local float sums[32 * 32];
  std::fill(sums, sums + m.M * m.M, 0.f);
  multiply(m.M, m.K, a, b, sums);
  // All of C is read before D is written: they may overlap.
  alignas(64) static thread_local u32 results[32 * 32];
  each_run(m.M, 0, [&](int r, int lane, int at) {
    const u32* from = w.v[c.index + r] + lane;
    for (int i = 0; i < m.M; i++)
      results[at + i] = (c.kind == ARG_VGPR ? from[i] : (u32)c.value) + (u32)(i32)sums[at + i];
  });
  each_run(m.M, 0, [&](int r, int lane, int at) {
    copy_row(m.M, &w.v[out.index + r][lane], results + at);
  });
}

static void run_matrix(Wave& w, const Ins& I) {
  const Matrix& m = MATRICES[I.op->shape.bytes];
  FullPrecision guard;
  static thread_local Operands left, right;
  const float* a = left.get(w, I.args[1], m, m.a);
  const float* b = right.get(w, I.args[2], m, m.b);
  if (m.a == EL_I8) multiply_integers(w, I, m, a, b);
  else multiply_blocks(w, I, m, a, b);
}

// ---- f8f6f4: 32 elements per lane. An fp8 lane holds two runs of 16 consecutive k, 16 * groups
// apart; fp6 and fp4 lanes hold 32 consecutive k. Scales are one e8m0 byte per 32 k.
enum { F8_E4M3 = 0, F8_E5M2 = 1, F6_E2M3 = 2, F6_E3M2 = 3, F4_E2M1 = 4 };
static void decode_small(Wave& w, const Arg& arg, int format, int j, float* out) {
  if (format <= F8_E5M2)
    return decode_fp8(w.v[arg.index + j / 4], 8 * (j % 4), E4M3_OCP + format, out);
  if (format == F4_E2M1) {
    FOR_LANES out[lane] = tables().fp4[w.v[arg.index + j / 8][lane] >> 4 * (j % 8) & 15];
    return;
  }
  int word = 6 * j / 32, shift = 6 * j % 32, next = shift > 26 ? word + 1 : word;
  const float* table = format == F6_E2M3 ? tables().fp6_e2m3 : tables().fp6_e3m2;
  FOR_LANES out[lane] =
      table[join(w.v[arg.index + word][lane], w.v[arg.index + next][lane]) >> shift & 63];
}
static void unpack_small(Wave& w, const Ins& I, int k_arg, int format, const Matrix& m,
                         float* tile) {
  int groups = LANES / m.M, position = k_arg - 1;
  int byte = (I.mods.op_sel >> position & 1) | (I.mods.op_sel_hi >> position & 1) << 1;
  bool scaled = I.nargs > 5;
  float scales[LANES], values[LANES];
  if (scaled) {
    const Arg& s = I.args[3 + k_arg];
    FOR_LANES {
      u32 word = s.kind == ARG_VGPR ? w.v[s.index][lane] : scalar(w, s);
      scales[lane] = e8m0_to_float(word >> 8 * byte & 255);
    }
  }
  for (int j = 0; j < 32; j++) {
    decode_small(w, I.args[k_arg], format, j, values);
    for (int group = 0; group < groups; group++) {
      int k = format <= F8_E5M2 ? j / 16 * 16 * groups + group * 16 + j % 16 : group * 32 + j;
      float* row = tile + k * m.M;
      copy_row(m.M, row, values + group * m.M);
      if (scaled)
        for (int i = 0; i < m.M; i++) row[i] *= scales[k / 32 * m.M + i];
    }
  }
}
static void run_scaled_matrix(Wave& w, const Ins& I) {
  const Matrix& m = SCALED_MATRICES[I.op->shape.bytes];
  FullPrecision guard;
  alignas(64) static thread_local float a[16 * 128], b[16 * 128];  // [k][row]
  unpack_small(w, I, 1, I.mods.cbsz, m, a);
  unpack_small(w, I, 2, I.mods.blgp, m, b);
  multiply_blocks(w, I, m, a, b);
}

// ---- undefined bits: an undefined A row or B column spoils that row or column of D
static u64 undefined_lanes(Wave& w, const Arg& a) {
  u64 mask = 0;
  if (a.kind == ARG_VGPR)
    for (int d = 0; d < a.count; d++)
      FOR_LANES mask |= (u64)(w.undefined[a.index + d][lane] != 0) << lane;
  return mask;
}
static void taint_matrix(Wave& w, const Ins& I) {
  bool small = I.op->shape.half;
  const Matrix& m = small ? SCALED_MATRICES[I.op->shape.bytes] : MATRICES[I.op->shape.bytes];
  u64 a = undefined_lanes(w, I.args[1]), b = undefined_lanes(w, I.args[2]);
  if (I.nargs > 5) a |= undefined_lanes(w, I.args[4]), b |= undefined_lanes(w, I.args[5]);
  u32 rows = 0, columns = 0;
  FOR_LANES {
    rows |= (u32)(a >> lane & 1) << lane % m.M;
    columns |= (u32)(b >> lane & 1) << lane % m.M;
  }
  const Arg& c = I.args[3];
  for (int r = 0; r < I.args[0].count; r++) {
    int per_block = m.M == 4 ? 4 : m.M * m.M / LANES, reg = I.args[0].index + r;
    u32 any = 0;
    FOR_LANES {
      u32 bad = (rows >> row_of(m.M, r % per_block, lane) | columns >> lane % m.M) & 1;
      u32 t = c.kind == ARG_VGPR ? spread(w.undefined[c.index + r][lane]) : 0;
      any |= w.undefined[reg][lane] = spread(bad) | t;
    }
    if (!any) {
      w.tainted.remove(reg);
      continue;
    }
    w.tainted.add(reg);
    w.attention.add(reg);
    for (int from = 0; from < NUM_VGPR; from++)
      if (I.reads.has(from) && w.tainted.has(from) && !I.writes.has(from)) {
        Origin o = w.origin[from];
        w.origin[reg] = o.pc < 0 ? Origin{I.pc, o.reg} : o;
        break;
      }
  }
}

static int register_matrices() {
  i8 index = 0;
  for (const Matrix& m : MATRICES) {
    u64 unit = m.a == EL_F32 ? 0 : (u64)XDL;
    add_op({m.name,
            VALU | MFMA | unit,
            run_matrix,
            taint_matrix,
            1,
            {0, index++, false, 0},
            m.passes});
  }
  index = 0;
  for (const Matrix& m : SCALED_MATRICES)
    add_op({m.name,
            VALU | MFMA | XDL,
            run_scaled_matrix,
            taint_matrix,
            1,
            {0, index++, false, 1},
            m.passes});
  return 0;
}
static int registered_matrices = register_matrices();

}  // namespace cdnasim
