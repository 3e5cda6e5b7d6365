// What a block of attention.cu keeps in shared memory, and which queries it works on next.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), BLOCK_N
// (keys of a tile, a multiple of 16), WARPGROUPS (that share a tile, 64 queries each), STAGES
// (tiles of keys and of values in flight), CAUSAL, WINDOW, FIRST_KEYS, SOFTCAP, PACKED and FP16 (0
// or 1), SHARED_COLUMNS (the last columns of queries and keys that lie in tensors of their own, all heads'
// keys in one head), and SHARED_BYTES (what the launch asks for).
// SHARED_BYTES (what the launch asks for).
#pragma once

#include "attention_packed.h"
#include "ring.h"

constexpr int ROWS = 64 * WARPGROUPS;
constexpr int THREADS = WARPGROUP * (WARPGROUPS + 1);

// A head is cut into columns of 64 elements: 128 bytes a row, what one swizzled box may hold.
constexpr int QK_COLUMNS = QK_DIM / 64, V_COLUMNS = V_DIM / 64;
constexpr int OWN_COLUMNS = QK_COLUMNS - SHARED_COLUMNS;
constexpr u32 Q_COLUMN_BYTES = 64 * 128, KV_COLUMN_BYTES = BLOCK_N * 128;
constexpr u32 Q_BYTES = QK_COLUMNS * Q_COLUMN_BYTES;
constexpr u32 K_BYTES = QK_COLUMNS * KV_COLUMN_BYTES;
constexpr u32 V_BYTES = V_COLUMNS * KV_COLUMN_BYTES;

constexpr u32 K_AT = WARPGROUPS * Q_BYTES;
constexpr u32 V_AT = K_AT + STAGES * K_BYTES;
constexpr u32 BARRIERS_AT = V_AT + STAGES * V_BYTES;

using QRing = Ring<1, 4>;  // one for each warpgroup
using KvRing = Ring<STAGES, 4 * WARPGROUPS>;
using ItemRing = Ring<2, 4 * WARPGROUPS>;

constexpr u32 K_BARRIERS_AT = BARRIERS_AT + WARPGROUPS * QRing::BYTES;
constexpr u32 V_BARRIERS_AT = K_BARRIERS_AT + KvRing::BYTES;
constexpr u32 ITEM_BARRIERS_AT = V_BARRIERS_AT + KvRing::BYTES;
constexpr u32 ITEMS_AT = ITEM_BARRIERS_AT + ItemRing::BYTES;
constexpr u32 ITEM_BYTES = PACKED ? 32 : 16;
static_assert(1024 + ITEMS_AT + 2 * ITEM_BYTES == SHARED_BYTES,
              "attention_config.py counts otherwise");

// A block's views of the shared memory at `base`, 1024-aligned.
struct Shared {
  u32 base;

  __device__ u32 q(int warpgroup) const { return base + warpgroup * Q_BYTES; }
  __device__ u32 k(u32 stage) const { return base + K_AT + stage * K_BYTES; }
  __device__ u32 v(u32 stage) const { return base + V_AT + stage * V_BYTES; }
  __device__ QRing q_ring(int warpgroup) const {
    return QRing(base + BARRIERS_AT + warpgroup * QRing::BYTES);
  }
  __device__ KvRing k_ring() const { return KvRing(base + K_BARRIERS_AT); }
  __device__ KvRing v_ring() const { return KvRing(base + V_BARRIERS_AT); }
  __device__ ItemRing item_ring() const { return ItemRing(base + ITEM_BARRIERS_AT); }
  __device__ u32 item(u32 place) const { return base + ITEMS_AT + ITEM_BYTES * place; }
};

// ROWS queries of one head against key tiles [begin, end); head < 0 ends the work. PACKED, the
// first query and key of their sequence, and how many it has.
struct Item {
  int head, rows, begin, end;
  int first_query, num_queries, first_key, num_keys;
};

DEVICE void write_four(u32 shared, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
DEVICE void read_four(u32 shared, int& a, int& b, int& c, int& d) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(shared)
               : "memory");
}

// `shift` is added to a query's index to get the key at its own position; PACKED, it is each
// sequence's own, and `from_end` says whether the last query stands at the last key.
struct Problem {
  int num_heads, heads_per_kv, all_heads;  // all_heads: of all batches
  int num_queries, num_keys, shift, window;
  int row_blocks, heads_together;
  const int *q_starts, *k_starts;
  int num_sequences, from_end;
  const int* first_keys;  // [batch, num_queries], where FIRST_KEYS: the first key that each sees

  __device__ int shift_of(const Item& item) const {
    return !PACKED ? shift : from_end ? item.num_keys - item.num_queries : 0;
  }
};

DEVICE void write_item(u32 shared, const Item& item) {
  write_four(shared, item.head, item.rows, item.begin, item.end);
  if (PACKED)
    write_four(shared + 16, item.first_query, item.num_queries, item.first_key, item.num_keys);
}
DEVICE Item read_item(u32 shared, const Problem& problem) {
  Item item;
  read_four(shared, item.head, item.rows, item.begin, item.end);
  if (PACKED) {
    read_four(shared + 16, item.first_query, item.num_queries, item.first_key, item.num_keys);
  } else {
    item.first_query = item.first_key = 0;
    item.num_queries = problem.num_queries, item.num_keys = problem.num_keys;
  }
  return item;
}

// The item of this index. `heads_together` heads, whose keys and values the L2 holds, advance side
// by side, and under a causal mask the longest rows come first, so that blocks end together. Of
// packed sequences, some items have no queries: rows >= num_queries.
DEVICE Item item_at(const Problem& problem, int index) {
  if (index >= problem.all_heads * problem.row_blocks) return {-1, 0, 0, 0, 0, 0, 0, 0};
  const int per_group = problem.heads_together * problem.row_blocks;
  const int first = index / per_group * problem.heads_together, rest = index % per_group;
  const int heads = min(problem.heads_together, problem.all_heads - first);
  const int block = problem.row_blocks - 1 - rest / heads;
  Item item{first + rest % heads, block * ROWS, 0, 0, 0, problem.num_queries, 0,
            problem.num_keys};
  if (PACKED) {
    const Sequence of = sequence_of<ROWS>(problem.q_starts, problem.num_sequences, block);
    item.rows = (block - of.slot) * ROWS;
    item.first_query = of.start, item.num_queries = of.length;
    item.first_key = problem.k_starts[of.number];
    item.num_keys = problem.k_starts[of.number + 1] - item.first_key;
  }
  const int shift = problem.shift_of(item);
  const int keys = CAUSAL ? min(item.num_keys, item.rows + ROWS + shift) : item.num_keys;
  // Rows that see no key go through one tile, all masked, which gives zeros.
  item.end = max(ceil_div(keys, BLOCK_N), 1);
  if (WINDOW) {
    const int oldest = item.rows + shift - problem.window + 1;
    item.begin = min(max(oldest / BLOCK_N, 0), item.end - 1);
  }
  if (FIRST_KEYS) {
    const int batch = item.head / problem.num_heads;
    const int first_key = problem.first_keys[(i64)batch * problem.num_queries + item.rows];
    item.begin = max(item.begin, min(first_key / BLOCK_N, item.end - 1));
  }
  return item;
}
