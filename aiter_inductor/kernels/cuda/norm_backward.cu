// Gradients of RMSNorm and LayerNorm. Each block walks over rows that TMA brings into shared memory
// and keeps its share of the weight's gradient in registers; a second kernel adds the shares in a
// fixed order, so that the same input gives the same gradient.
//
// Defined by the build, see norm_backward.py: X (type of the rows), W (of the weight), THREADS a
// block, VECTORS of 16 bytes a thread, VEC elements a vector, STAGES, PER_SM (blocks that share a
// multiprocessor), HAS_GRAD_SUM, HAS_WEIGHT, HAS_BIAS, LAYER_NORM, ROUND_BEFORE_WEIGHT. A row is
// exactly THREADS * VECTORS vectors.
#include "../hip/numeric.h"
#include "../hip/reduce.h"
#include "stages.h"

constexpr int N = THREADS * VECTORS * VEC;
constexpr u32 ROW_BYTES = N * sizeof(X), INPUTS = 2 + HAS_GRAD_SUM;
typedef Stages<STAGES, INPUTS, ROW_BYTES> Ring;

struct Rows {
  const X *x, *grad, *grad_sum;
  i64 x_stride, grad_stride, grad_sum_stride;

  __device__ void fetch(const Ring& ring, u32 stage, i64 row) const {
    const X *of_x = x + row * x_stride, *of_grad = grad + row * grad_stride;
#if HAS_GRAD_SUM
    ring.fetch(stage, {of_x, of_grad, grad_sum + row * grad_sum_stride});
#else
    ring.fetch(stage, {of_x, of_grad});
#endif
  }
};

SIMT_DEVICE void read_vector(const u8* row, int v, float (&to)[VEC]) {
  load((const X*)row + (threadIdx.x + v * THREADS) * VEC, to);
}

// A row's mean, one over its deviation, and the means of dy and of dy * y, where dy is the gradient
// times the weight and y the normalised row.
struct Means {
  float mean, factor, of_dy, of_dy_y;
};

SIMT_DEVICE float wave_sum(float x) { return float_of(wave_reduce<WAVE, Sum>(bits_of(x))); }

constexpr int BLOCK_WAVES = THREADS / WAVE;
constexpr float ELEMENTS_A_WAVE = WAVE * VECTORS * VEC;

// As in moments_of of norm.h, products with x are taken less the mean of a wave's part.
SIMT_DEVICE Means means_of(const float (&x)[VECTORS][VEC], const float (&dy)[VECTORS][VEC],
                           float eps, float* of_waves) {
  float mean = 0.0f, squares = 0.0f, products = 0.0f, sum = 0.0f;
  if constexpr (LAYER_NORM) {
    UNROLL for (int v = 0; v < VECTORS; v++) UNROLL for (int i = 0; i < VEC; i++) {
      mean += x[v][i];
      sum += dy[v][i];
    }
    mean = wave_sum(mean) / ELEMENTS_A_WAVE;
    sum = wave_sum(sum);
  }
  UNROLL for (int v = 0; v < VECTORS; v++) UNROLL for (int i = 0; i < VEC; i++) {
    const float apart = x[v][i] - mean;
    squares = multiply_add(apart, apart, squares);
    products = multiply_add(dy[v][i], apart, products);
  }
  squares = wave_sum(squares);
  products = wave_sum(products);
  if (threadIdx.x % WAVE == 0)
    ((float4*)of_waves)[threadIdx.x / WAVE] = make_float4(squares, products, mean, sum);
  __syncthreads();
  float4 all[BLOCK_WAVES];
  UNROLL for (int w = 0; w < BLOCK_WAVES; w++) all[w] = ((const float4*)of_waves)[w];
  squares = products = mean = sum = 0.0f;
  UNROLL for (int w = 0; w < BLOCK_WAVES; w++) {
    squares += all[w].x;
    products += all[w].y;
    mean += all[w].z;
    sum += all[w].w;
  }
  mean /= BLOCK_WAVES;
  if constexpr (LAYER_NORM) UNROLL for (int w = 0; w < BLOCK_WAVES; w++) {
    const float apart = all[w].z - mean;
    squares = multiply_add(apart * apart, ELEMENTS_A_WAVE, squares);
    products = multiply_add(apart, all[w].w, products);
  }
  const float factor = inverse_sqrt(squares / N + eps);
  return {mean, factor, sum / N, products * factor / N};
}

struct Sums {
  float weight[VECTORS][VEC], bias[VECTORS][VEC];
};

SIMT_DEVICE void finish_row(const u8* stage, const Means& means, const float (&x)[VECTORS][VEC],
                            const float (&grad)[VECTORS][VEC], const float (&weight)[VECTORS][VEC],
                            X* dx, Sums& sums) {
  UNROLL for (int v = 0; v < VECTORS; v++) {
    float y[VEC], to[VEC];
    UNROLL for (int i = 0; i < VEC; i++) {
      y[i] = (x[v][i] - means.mean) * means.factor;
      const float dy = HAS_WEIGHT ? grad[v][i] * weight[v][i] : grad[v][i];
      to[i] = (dy - means.of_dy - y[i] * means.of_dy_y) * means.factor;
    }
    if constexpr (HAS_GRAD_SUM) {
      float more[VEC];
      read_vector(stage + 2 * ROW_BYTES, v, more);
      UNROLL for (int i = 0; i < VEC; i++) to[i] += more[i];
    }
    store(dx + (threadIdx.x + v * THREADS) * VEC, to);
    if constexpr (ROUND_BEFORE_WEIGHT) round_all<X>(y);
    UNROLL for (int i = 0; i < VEC; i++) {
      if (HAS_WEIGHT) sums.weight[v][i] = multiply_add(grad[v][i], y[i], sums.weight[v][i]);
      if (HAS_BIAS) sums.bias[v][i] += grad[v][i];
    }
  }
}

SIMT_DEVICE void store_shares(float* shares, const float (&sums)[VECTORS][VEC]) {
  UNROLL for (int v = 0; v < VECTORS; v++)
    store(shares + (i64)blockIdx.x * N + (threadIdx.x + v * THREADS) * VEC, sums[v]);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
norm_backward_kernel(const X* grad, const X* grad_sum, const X* x, const W* weight, X* dx,
                     float* shares, i32 num_rows, float eps, float weight_offset,
                     i64 grad_stride, i64 grad_sum_stride, i64 x_stride, i64 dx_stride) {
  extern __shared__ __align__(128) u8 stages[];
  __shared__ u64 barriers[STAGES];
  __shared__ __align__(16) float of_waves[2][BLOCK_WAVES * 4];
  const Rows rows = {x, grad, grad_sum, x_stride, grad_stride, grad_sum_stride};
  Ring ring(stages, barriers);
  const i32 step = gridDim.x;
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  begin();
  i32 ahead = blockIdx.x;
  if (threadIdx.x == 0)
    for (u32 s = 0; s < STAGES; s++, ahead += step)
      if (ahead < num_rows) rows.fetch(ring, s, ahead);
  float w[VECTORS][VEC] = {};
  if constexpr (HAS_WEIGHT) UNROLL for (int v = 0; v < VECTORS; v++) {
    load(weight + (threadIdx.x + v * THREADS) * VEC, w[v]);
    UNROLL for (int i = 0; i < VEC; i++) w[v][i] += weight_offset;
  }
  Sums sums = {};
  u32 turn = 0;
  for (i32 row = blockIdx.x; row < num_rows; row += step, turn ^= 1) {
    float of_x[VECTORS][VEC], g[VECTORS][VEC], dy[VECTORS][VEC];
    const u8* stage = ring.wait();
    UNROLL for (int v = 0; v < VECTORS; v++) {
      read_vector(stage, v, of_x[v]);
      read_vector(stage + ROW_BYTES, v, g[v]);
      UNROLL for (int i = 0; i < VEC; i++) dy[v][i] = HAS_WEIGHT ? g[v][i] * w[v][i] : g[v][i];
    }
    const Means means = means_of(of_x, dy, eps, of_waves[turn]);
    finish_row(stage, means, of_x, g, w, dx + row * dx_stride, sums);
    if constexpr (HAS_GRAD_SUM) __syncthreads();
    if (threadIdx.x == 0) {
      if (ahead < num_rows) rows.fetch(ring, ring.stage, ahead);
      ahead += step;
    }
    ring.next();
  }
  if constexpr (HAS_WEIGHT) store_shares(shares, sums.weight);
  if constexpr (HAS_BIAS) store_shares(shares + (HAS_WEIGHT ? (i64)step * N : 0), sums.bias);
}

// first[N], second[N] = the sums of shares[gridDim.y, num_shares, N] over the blocks.
constexpr int COLUMNS = 4, ACROSS = 8, SLICES = 32, AT_ONCE = 5;

extern "C" __global__ void __launch_bounds__(ACROSS * SLICES)
sum_shares_kernel(const float* shares, W* first, W* second, i32 num_shares) {
  __shared__ float4 of_slices[SLICES][ACROSS];
  const int across = threadIdx.x % ACROSS, slice = threadIdx.x / ACROSS;
  const int column = (blockIdx.x * ACROSS + across) * COLUMNS;
  begin();
  shares += (i64)blockIdx.y * num_shares * N;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int first = slice; first < num_shares; first += AT_ONCE * SLICES) {
    float4 x[AT_ONCE];
    UNROLL for (int i = 0; i < AT_ONCE; i++) {
      const int share = first + i * SLICES;
      x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (share < num_shares) x[i] = *(const float4*)(shares + (i64)share * N + column);
    }
    UNROLL for (int i = 0; i < AT_ONCE; i++) {
      sum.x += x[i].x;
      sum.y += x[i].y;
      sum.z += x[i].z;
      sum.w += x[i].w;
    }
  }
  of_slices[slice][across] = sum;
  __syncthreads();
  if (threadIdx.x >= ACROSS * COLUMNS) return;
  const int lane = threadIdx.x / COLUMNS, part = threadIdx.x % COLUMNS;
  float total = 0.0f;
  UNROLL for (int s = 0; s < SLICES; s++) total += ((const float*)&of_slices[s][lane])[part];
  const float one[1] = {total};
  store((blockIdx.y ? second : first) + blockIdx.x * ACROSS * COLUMNS + threadIdx.x, one);
}
