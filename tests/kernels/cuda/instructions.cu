// A product by each kind of operand that wgmma.h offers, loaded by TMA: see test_instructions.py.
#include "barrier.h"
#include "tma.h"
#include "wgmma.h"

constexpr u32 M = 64, N = 128, K = 64;

// out[M, N] = a[M, K] b, where b is [N, K] or, MN-major, [K, N]; a from registers where asked.
extern "C" __global__ void __launch_bounds__(128, 1)
    product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
            float* out) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barrier;
  const u32 a = shared_address(shared), b = a + 16384, full = shared_address(&barrier);
  const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    fence_barrier_init();
    barrier_expect(full, M * K * 2 + N * K * 2);
    tma_load(a, a_map, full, 0, 0);
    for (u32 column = 0; column < (COLUMNS_OF_B ? N : 64); column += 64)
      tma_load(b + column * 128, b_map, full, column, 0);
  }
  __syncthreads();
  barrier_wait(full, 0);
  float d[N / 2];
  const u64 first = COLUMNS_OF_B ? mn_major_descriptor(b, K * 128) : k_major_descriptor(b);
  wgmma_fence();
  UNROLL for (u32 k = 0; k < K; k += 16) {
    const u64 b_step = first + (COLUMNS_OF_B ? k * 128 : k * 2 & 0xff) / 16;
    if (A_IN_REGISTERS) {
      u32 packed[4];
      UNROLL for (u32 i = 0; i < 4; i++) {
        const u32 row = warp * 16 + i % 2 * 8 + lane / 4, column = k + i / 2 * 8 + lane % 4 * 2;
        packed[i] = *(u32*)(shared + swizzle_128(row, column / 8) + column % 8 * 2);
      }
      Wgmma<N>::bf16<COLUMNS_OF_B>(d, packed, b_step, k != 0);
    } else {
      Wgmma<N>::bf16<false, COLUMNS_OF_B>(d, k_major_descriptor(a) + k * 2 / 16, b_step, k != 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  UNROLL for (u32 i = 0; i < N / 2; i++) {
    const u32 row = warp * 16 + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[row * N + column] = d[i];
  }
}
