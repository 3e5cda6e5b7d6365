// What a block of attention_backward.cu keeps in shared memory, and what it works on.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), MAKES_DK
// and MAKES_DV (0 or 1), Q_STAGES and DO_STAGES (blocks of queries, and of output gradients, in
// flight), CAUSAL, WINDOW, FIRST_KEYS, PACKED and FP16 (0 or 1), and SHARED_BYTES (what the launch
// asks for).
#pragma once

#include "attention_packed.h"
#include "ring.h"
#include "tma.h"

constexpr int KEYS = 128, QUERIES = 64;
constexpr u32 READERS = 8;  // warps that multiply

// A head is cut into columns of 64 elements: 128 bytes a row, what one swizzled box may hold.
constexpr int QK_COLUMNS = QK_DIM / 64, V_COLUMNS = V_DIM / 64;
constexpr u32 KEY_COLUMN_BYTES = KEYS * 128, QUERY_COLUMN_BYTES = QUERIES * 128;
constexpr u32 K_BYTES = QK_COLUMNS * KEY_COLUMN_BYTES;
constexpr u32 V_BYTES = MAKES_DK ? V_COLUMNS * KEY_COLUMN_BYTES : 0;
constexpr u32 Q_BYTES = QK_COLUMNS * QUERY_COLUMN_BYTES;
constexpr u32 DO_BYTES = V_COLUMNS * QUERY_COLUMN_BYTES;
constexpr u32 DS_BYTES = MAKES_DK ? KEYS * 128 : 0;
constexpr u32 ROW_BYTES = QUERIES * 4;  // one number a query

constexpr u32 V_AT = K_BYTES;
constexpr u32 Q_AT = V_AT + V_BYTES;
constexpr u32 DO_AT = Q_AT + Q_STAGES * Q_BYTES;
constexpr u32 DS_AT = DO_AT + DO_STAGES * DO_BYTES;
constexpr u32 LSE_AT = DS_AT + 2 * DS_BYTES;
constexpr u32 DELTA_AT = LSE_AT + Q_STAGES * ROW_BYTES;
constexpr u32 BARRIERS_AT = DELTA_AT + DO_STAGES * ROW_BYTES;

using KeyRing = Ring<1, READERS>;
using QRing = Ring<Q_STAGES, READERS>;
using DoRing = Ring<DO_STAGES, READERS>;
constexpr u32 Q_BARRIERS_AT = BARRIERS_AT + KeyRing::BYTES;
constexpr u32 DO_BARRIERS_AT = Q_BARRIERS_AT + QRing::BYTES;
static_assert(1024 + DO_BARRIERS_AT + DoRing::BYTES == SHARED_BYTES,
              "attention_backward_config.py counts otherwise");

// Lengths are those of every sequence, or, PACKED, of all of them together as one batch; `shift`
// is added to a query's index to get the key at its own position. PACKED computes it: FROM_END
// says whether the last query stands at the last key.
struct Problem {
  int num_heads, heads_per_kv, kv_heads, all_kv_heads;
  int num_queries, num_keys, shift, window;
  int key_blocks, query_blocks, together;
  const int *q_starts, *k_starts;
  int num_sequences, from_end;
  const int* first_keys;  // [batch, num_queries], where FIRST_KEYS: the first key that each sees
};

// KEYS keys of one head, from `key` of its sequence on, seen by query blocks [begin, end) of each
// head that shares them. Sequences start at rows `first_query` and `first_key`, and their blocks
// are kept from number `first_block` on.
struct Item {
  int batch, kv_head, key, begin, end;
  int first_query, first_key, first_block, num_queries, num_keys, shift;
};

// The first of `end` blocks of queries that sees keys from that of query `seer` on.
DEVICE int first_block(int seer, int end) { return CAUSAL ? min(max(seer, 0) / QUERIES, end) : 0; }

// How many of `end` blocks of queries, from the first on, begin with one that sees key `key`.
DEVICE int blocks_seeing(const int* first_keys, int key, int end) {
  int low = 0, high = end;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (first_keys[middle * QUERIES] <= key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Under a causal mask the first keys are seen by most queries: they come first.
DEVICE Item item_at(const Problem& problem, int index) {
  const int per_group = problem.together * problem.key_blocks;
  const int first = index / per_group * problem.together, rest = index % per_group;
  const int heads = min(problem.together, problem.all_kv_heads - first);
  const int head = first + rest % heads, block = rest / heads;
  Item item{head / problem.kv_heads, head % problem.kv_heads, block * KEYS, 0, 0, 0, 0, 0,
            problem.num_queries, problem.num_keys, problem.shift};
  if (PACKED) {
    const Sequence of = sequence_of<KEYS>(problem.k_starts, problem.num_sequences, block);
    item.key = (block - of.slot) * KEYS;
    item.first_key = of.start, item.num_keys = of.length;
    item.first_query = problem.q_starts[of.number];
    item.num_queries = problem.q_starts[of.number + 1] - item.first_query;
    item.first_block = item.first_query / QUERIES + of.number;
    item.shift = problem.from_end ? item.num_keys - item.num_queries : 0;
    if (item.key >= item.num_keys) return item;
  }
  item.end = ceil_div(item.num_queries, QUERIES);
  if (WINDOW) {
    const int newest = item.key + KEYS - 2 + problem.window - item.shift;
    item.end = min(item.end, newest < 0 ? 0 : newest / QUERIES + 1);
  }
  if (FIRST_KEYS) {
    const int* first_keys = problem.first_keys + (i64)item.batch * problem.num_queries;
    item.end = blocks_seeing(first_keys, min(item.key + KEYS, item.num_keys) - 1, item.end);
  }
  item.begin = first_block(item.key - item.shift, item.end);
  return item;
}

// The blocks of queries of an item, in the order in which both kinds of warps walk over them.
struct Walk {
  const Problem& problem;
  int num_queries, num_keys;  // of the sequence, and of it from the item's first key on
  int seer;                   // the query that stands at that key
  int end, head, block;
  int chunk;  // of what is kept for each block of queries of each head
  int row;    // where FIRST_KEYS, of the batch's first query among those of all

  __device__ Walk(const Problem& problem, const Item& item)
      : problem(problem), num_queries(item.num_queries), num_keys(item.num_keys - item.key),
        seer(item.key - item.shift), end(item.end), head(item.kv_head * problem.heads_per_kv),
        block(item.begin), row(item.batch * problem.num_queries) {
    chunk = (item.batch * problem.num_heads + head) * problem.query_blocks + item.first_block +
            block;
  }
  __device__ int begin() const { return first_block(seer, end); }
  // Where FIRST_KEYS, by how many keys that of query `index` lies behind the item's first one.
  __device__ int first_key(int index) const {
    return problem.first_keys[row + min(index, num_queries - 1)] - seer - problem.shift;
  }
  __device__ int count() const { return (end - begin()) * problem.heads_per_kv; }
  __device__ void next() {
    chunk++;
    if (++block < end) return;
    chunk += problem.query_blocks - (end - begin());
    block = begin();
    head++;
  }
};

// dQ is kept in fp32 in the order of registers: each block of queries in pieces of 32 columns.
constexpr int PIECE = 32;
constexpr int PIECE_FLOATS = QUERIES * PIECE;
