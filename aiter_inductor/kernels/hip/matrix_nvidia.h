// matrix.h for sm_90: mma.sync.m16n8k16, whose operand rows are swizzled by movmatrix.
#pragma once

constexpr int COLUMNS = 8, ROWS = 2, OWN = 2;

SIMT_DEVICE int lane() { return thread_index() % WAVE; }
SIMT_DEVICE int lane_group() { return lane() / 4; }
SIMT_DEVICE int lane_quarter() { return lane() % 4; }
SIMT_DEVICE int lane_at(int group, int quarter) { return 4 * group + quarter; }

// Each quarter holds the pairs 2 j and 2 j + 8 of the instruction's inner dimension.
SIMT_DEVICE int a_row(int h) { return lane_group() + 8 * h; }
SIMT_DEVICE int quarter_of(int row) { return row % 8 / 2; }
SIMT_DEVICE int place_of(int row) { return row % 2 + row / 8 * 2; }
SIMT_DEVICE int c_row(int r) { return lane_group() + r / 2 * 8; }
SIMT_DEVICE int column(int i) { return 2 * lane_quarter() + i; }

template <class T>
SIMT_DEVICE void multiply(float (&c)[4], const u32 (&a)[ROWS][2], const u32 (&b)[2]) {
  if constexpr (same<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0][0]), "r"(a[1][0]), "r"(a[0][1]), "r"(a[1][1]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0][0]), "r"(a[1][0]), "r"(a[0][1]), "r"(a[1][1]), "r"(b[0]), "r"(b[1]));
}

template <class T> SIMT_DEVICE void transposed(const float (&c)[4], u32 (&b)[2]) {
  UNROLL for (int i = 0; i < 2; i++) {
    const u32 pair = encode_pair<T>(c[2 * i], c[2 * i + 1]);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b[i]) : "r"(pair));
  }
}

SIMT_DEVICE bool lane_leads() { return lane_group() == 0; }
SIMT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
SIMT_DEVICE float log2_of(float x) { return log2f(x); }
SIMT_DEVICE i32 uniform(i32 x) { return x; }
SIMT_DEVICE u32 shuffle(u32 x, int from) { return __shfl_sync(~0u, x, from); }
SIMT_DEVICE bool in_any_lane(bool condition) { return __any_sync(~0u, condition); }

template <class Op> SIMT_DEVICE u32 over_rows(u32 x) {
  UNROLL for (int step = 4; step < 32; step *= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
template <class Op> SIMT_DEVICE u32 over_quarters(u32 x) {
  UNROLL for (int step = 1; step < 4; step *= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

SIMT_DEVICE u32 interleave(u32 x, u32 y, u32 select) { return __byte_perm(x, y, select); }

template <class T> SIMT_DEVICE u32 fp8_pair(u32 word, bool high) {
  static_assert(same<T, fp8_e4m3fn>, "the flavour that sm_90 converts");
  u32 pair;
  if (high)  // the instruction reads either half of a register
    asm("{\n.reg .b16 half;\nmov.b32 {_, half}, %1;\ncvt.rn.f16x2.e4m3x2 %0, half;\n}\n"
        : "=r"(pair)
        : "r"(word));
  else
    asm("{\n.reg .b16 half;\nmov.b32 {half, _}, %1;\ncvt.rn.f16x2.e4m3x2 %0, half;\n}\n"
        : "=r"(pair)
        : "r"(word));
  return pair;
}
