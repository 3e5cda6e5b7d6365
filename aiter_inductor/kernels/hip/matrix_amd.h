// matrix.h for gfx942 and gfx950: MFMA of 16 x 16 x 16, whose result is its own operand B.
#pragma once

constexpr int COLUMNS = 16, ROWS = 1, OWN = 1;

SIMT_DEVICE int lane() { return thread_index() % WAVE; }
SIMT_DEVICE int lane_group() { return lane() % 16; }
SIMT_DEVICE int lane_quarter() { return lane() / 16; }
SIMT_DEVICE int lane_at(int group, int quarter) { return group + 16 * quarter; }

SIMT_DEVICE int a_row(int) { return lane_group(); }
SIMT_DEVICE int quarter_of(int row) { return row / 4; }
SIMT_DEVICE int place_of(int row) { return row % 4; }
SIMT_DEVICE int c_row(int r) { return 4 * lane_quarter() + r; }
SIMT_DEVICE int column(int) { return lane_group(); }

typedef float fp32x4 __attribute__((ext_vector_type(4)));
typedef short bits16x4 __attribute__((ext_vector_type(4)));
typedef _Float16 fp16x4 __attribute__((ext_vector_type(4)));

template <class T>
SIMT_DEVICE void multiply(float (&c)[4], const u32 (&a)[ROWS][2], const u32 (&b)[2]) {
  const u64 left = (u64)a[0][1] << 32 | a[0][0], right = (u64)b[1] << 32 | b[0];
  const fp32x4 sum = {c[0], c[1], c[2], c[3]};
  fp32x4 found;
  if constexpr (same<T, bf16>)
    found = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(bits16x4, left),
                                                      __builtin_bit_cast(bits16x4, right), sum, 0,
                                                      0, 0);
  else
    found = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(fp16x4, left),
                                                  __builtin_bit_cast(fp16x4, right), sum, 0, 0, 0);
  UNROLL for (int r = 0; r < 4; r++) c[r] = found[r];
}

template <class T> SIMT_DEVICE void transposed(const float (&c)[4], u32 (&b)[2]) {
  UNROLL for (int i = 0; i < 2; i++) b[i] = encode_pair<T>(c[2 * i], c[2 * i + 1]);
}

SIMT_DEVICE bool lane_leads() { return lane_quarter() == 0; }
SIMT_DEVICE float larger(float a, float b) { return __builtin_fmaxf(a, b); }
SIMT_DEVICE float log2_of(float x) { return __builtin_amdgcn_logf(x); }
SIMT_DEVICE i32 uniform(i32 x) { return __builtin_amdgcn_readfirstlane(x); }
SIMT_DEVICE u32 shuffle(u32 x, int from) {
  return (u32)__builtin_amdgcn_ds_bpermute(4 * from, (int)x);
}
SIMT_DEVICE bool in_any_lane(bool condition) { return __builtin_amdgcn_ballot_w64(condition) != 0; }

template <class Op> SIMT_DEVICE u32 over_rows(u32 x) {
  UNROLL for (int step = 16; step < 64; step *= 2) x = Op::of(x, shuffle(x, lane() ^ step));
  return x;
}
template <class Op> SIMT_DEVICE u32 over_quarters(u32 x) { return over_rows<Op>(x); }

SIMT_DEVICE u32 interleave(u32 x, u32 y, u32 select) {
  const u32 bytes = (select & 0xf) | (select >> 4 & 0xf) << 8 | (select >> 8 & 0xf) << 16 |
                    (select >> 12 & 0xf) << 24;
  return __builtin_amdgcn_perm(y, x, bytes);
}

template <class T> SIMT_DEVICE u32 fp8_pair(u32 word, bool high) {
  static_assert(same<T, fp8_e4m3fn> == (NATIVE_FP8 == Fp8::e4m3fn), "the flavour of this chip");
  const auto pair = high ? __builtin_amdgcn_cvt_pk_f32_fp8((int)word, true)
                         : __builtin_amdgcn_cvt_pk_f32_fp8((int)word, false);
  return __builtin_bit_cast(u32, __builtin_amdgcn_cvt_pkrtz(pair[0], pair[1]));
}
