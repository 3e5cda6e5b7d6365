// Per-row fp8 quantisation in HIP without any ROCm header: one workgroup of 256 per row.
typedef unsigned u32;
typedef u32 u32x4 __attribute__((ext_vector_type(4)));
typedef u32 u32x2 __attribute__((ext_vector_type(2)));
#define DEVICE static __attribute__((device)) inline __attribute__((always_inline))

#if defined(__gfx950__)
#define LARGEST 448.f
#else
#define LARGEST 240.f
#endif

template <int CONTROL, int ROWS>
DEVICE float shifted(float old, float x) {
  return __builtin_bit_cast(float, __builtin_amdgcn_update_dpp(__builtin_bit_cast(int, old), __builtin_bit_cast(int, x), CONTROL, ROWS, 0xf, false));
}

DEVICE float wave_max(float x) {
  x = __builtin_fmaxf(x, shifted<0x111, 0xf>(x, x));
  x = __builtin_fmaxf(x, shifted<0x112, 0xf>(x, x));
  x = __builtin_fmaxf(x, shifted<0x114, 0xf>(x, x));
  x = __builtin_fmaxf(x, shifted<0x118, 0xf>(x, x));
  x = __builtin_fmaxf(x, shifted<0x142, 0xa>(x, x));
  x = __builtin_fmaxf(x, shifted<0x143, 0xc>(x, x));
  return __builtin_bit_cast(float, __builtin_amdgcn_readlane(__builtin_bit_cast(int, x), 63));
}

// x: [rows, n8 * 8] bf16, out: [rows, n8 * 8] fp8, scale: [rows] f32.
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(256, 256))) void row_quant(
    const u32x4* x, u32x2* out, float* scale, int n8) {
  static __attribute__((shared)) float parts[4];
  int thread = __builtin_amdgcn_workitem_id_x(), row = __builtin_amdgcn_workgroup_id_x();
  u32x4 words = {0, 0, 0, 0};
  if (thread < n8) words = x[row * n8 + thread];
  float value[8], largest = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    value[2 * i] = __builtin_bit_cast(float, words[i] << 16);
    value[2 * i + 1] = __builtin_bit_cast(float, words[i] & 0xffff0000u);
    largest = __builtin_fmaxf(largest, __builtin_fmaxf(__builtin_fabsf(value[2 * i]), __builtin_fabsf(value[2 * i + 1])));
  }
  largest = wave_max(largest);
  if (thread % 64 == 0) parts[thread / 64] = largest;
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
  largest = __builtin_fmaxf(__builtin_fmaxf(parts[0], parts[1]), __builtin_fmaxf(parts[2], parts[3]));
  largest = __builtin_fmaxf(largest, 1e-10f);
  if (thread == 0) scale[row] = largest / LARGEST;
  if (thread >= n8) return;
  float inverse = LARGEST / largest;
  u32x2 packed;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 low = __builtin_amdgcn_cvt_pk_fp8_f32(value[4 * i] * inverse, value[4 * i + 1] * inverse, 0, false);
    packed[i] = __builtin_amdgcn_cvt_pk_fp8_f32(value[4 * i + 2] * inverse, value[4 * i + 3] * inverse, low, true);
  }
  out[row * n8 + thread] = packed;
}

// A table in constant memory, read through s_getpc_b64; its index differs per work-item.
static __attribute__((device)) const u32 table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(64, 64))) void look_up(
    const u32* index, u32* out) {
  int thread = __builtin_amdgcn_workitem_id_x();
  out[thread] = table[index[thread] & 7];
}
