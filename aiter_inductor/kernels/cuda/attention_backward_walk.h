// Which keys a block of a backward kernel works on, and the queries that it walks over.
//
// The source that includes it defines KEYS (of an item) and QUERIES (of a block); the build CAUSAL,
// WINDOW, FIRST_KEYS and PACKED (0 or 1).
#pragma once

#include "attention_packed.h"

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

// The blocks of queries of an item, in the order in which all warps walk over them: from the last one
// of a head, which most keys are seen by under a causal mask, so that blocks that begin together read
// the same queries, and add to the same sums, of the L2.
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
        block(item.end - 1), row(item.batch * problem.num_queries) {
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
    chunk--;
    if (--block >= begin()) return;
    chunk += problem.query_blocks + (end - begin());
    block = end - 1;
    head++;
  }
};
