// What comes before and after attention_backward.cu, a pass over the queries each.
//
// The build defines PACKED and FP16 (0 or 1).

#include "attention_packed.h"
#include "attention_rows.h"

constexpr int QUERIES = 64;  // of a block, as in attention_backward_work.h
constexpr int PIECE = 32;

// The block of queries `block` of a batch: the row at which its sequence starts, its own first row
// there, and how many queries the sequence has. PACKED: of one of the sequences.
struct Place {
  int start, row, num_queries;
};

DEVICE Place place_of(int block, int num_queries, const int* starts, int num_sequences) {
  if (!PACKED) return {0, block * QUERIES, num_queries};
  const Sequence of = sequence_of<QUERIES>(starts, num_sequences, block);
  return {of.start, (block - of.slot) * QUERIES, of.length};
}

DEVICE float dot(u32 pair, u32 other) {
  const float2 x = unpack_16(pair), y = unpack_16(other);
  return x.x * y.x + x.y * y.y;
}

// For each query, padded to whole blocks: its log-sum-exp in powers of two, plus infinity where it
// sees nothing; what the normalisation takes from the gradient of every probability; and zeros in
// `parts`, `padded_dim` numbers. Half a warp a query; strides in elements.
extern "C" __global__ void attention_backward_rows(
    const u16* out, const u16* grad, const float* lse, const float* grad_lse, const int* starts,
    float* lse_log2, float* delta, float* parts, int num_heads, int num_queries, int blocks,
    int num_sequences, int all_rows, int v_dim, int padded_dim, i64 out_batch, i64 out_head,
    i64 out_row, i64 grad_batch, i64 grad_head, i64 grad_row) {
  constexpr int LANES = 16;
  const int lane = threadIdx.x % LANES;
  const int index = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (index >= all_rows) return;  // a whole warp: rows come in blocks
  for (int i = 4 * lane; i < padded_dim; i += 4 * LANES)
    *(float4*)(parts + (i64)index * padded_dim + i) = make_float4(0.f, 0.f, 0.f, 0.f);
  const int head = index / QUERIES / blocks, batch = head / num_heads;
  const Place place = place_of(index / QUERIES % blocks, num_queries, starts, num_sequences);
  const int in_sequence = place.row + index % QUERIES, row = place.start + in_sequence;
  const bool lives = in_sequence < place.num_queries;
  float sum = 0.f;
  if (lives) {
    const u16* o = out + batch * out_batch + head % num_heads * out_head + row * out_row;
    const u16* d = grad + batch * grad_batch + head % num_heads * grad_head + row * grad_row;
    uint4 x[2] = {}, y[2] = {};  // of up to 256 elements, all on their way together
    UNROLL for (int i = 0; i < 2; i++) {
      const int column = 8 * (lane + i * LANES);
      if (column >= v_dim) continue;
      x[i] = *(const uint4*)(o + column), y[i] = *(const uint4*)(d + column);
    }
    UNROLL for (int i = 0; i < 2; i++)
      sum += dot(x[i].x, y[i].x) + dot(x[i].y, y[i].y) + dot(x[i].z, y[i].z) +
             dot(x[i].w, y[i].w);
  }
  UNROLL for (int lanes = LANES / 2; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane != 0) return;
  float log_sum = INF;
  if (lives) {
    const i64 at = (i64)head * num_queries + row;
    if (grad_lse) sum -= grad_lse[at];
    if (lse[at] != -INF) log_sum = lse[at] * LOG2_E;
  }
  lse_log2[index] = log_sum;
  delta[index] = sum;
}

// dQ out of the parts that attention_backward added up in the order of its registers. A block for
// two pieces of each block of queries, blockIdx.y of them before.
extern "C" __global__ void attention_backward_dq(const float* parts, const int* starts, u16* dq,
                                                 int num_heads, int num_queries, int blocks,
                                                 int num_sequences, int qk_dim, int padded_dim,
                                                 float scale, i64 batch_stride, i64 head_stride,
                                                 i64 row_stride) {
  const int head = blockIdx.x / blocks;
  const Place place = place_of(blockIdx.x % blocks, num_queries, starts, num_sequences);
  const int piece = blockIdx.y * 2 + threadIdx.x / WARPGROUP;
  const int row = place.row + threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
  const i64 chunk = (i64)blockIdx.x * (padded_dim / PIECE) + piece;
  const float4* from =
      (const float4*)(parts + chunk * (QUERIES * PIECE)) + threadIdx.x % WARPGROUP;
  float d[PIECE / 2];
  UNROLL for (int j = 0; j < PIECE / 8; j++) {
    const float4 x = from[j * WARPGROUP];
    d[4 * j] = x.x, d[4 * j + 1] = x.y, d[4 * j + 2] = x.z, d[4 * j + 3] = x.w;
  }
  const float factor[2] = {scale, scale};
  u16* to = dq + head / num_heads * batch_stride + head % num_heads * head_stride +
            (place.start + row) * row_stride + PIECE * piece;
  write_rows(d, factor, to, row_stride, place.num_queries - row, qk_dim - PIECE * piece);
}
