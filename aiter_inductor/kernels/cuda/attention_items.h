// Which queries a block works on, and against which tiles of keys.
//
// The source that includes it defines ROWS (queries of an item) and BLOCK_N (keys of a tile); the
// build CAUSAL, WINDOW, FIRST_KEYS and PACKED (0 or 1).
#pragma once

#include "attention_packed.h"

// ROWS queries of one head against key tiles [begin, end); head < 0 ends the work. PACKED, the
// first query and key of their sequence, how many it has, and its number.
struct Item {
  int head, rows, begin, end;
  int first_query, num_queries, first_key, num_keys;
  int sequence;
};

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

// The item of this index. `heads_together` heads, whose keys and values the L2 holds, advance side
// by side, and under a causal mask the longest rows come first, so that blocks end together. Of
// packed sequences, some items have no queries: rows >= num_queries.
DEVICE Item item_at(const Problem& problem, int index) {
  if (index >= problem.all_heads * problem.row_blocks) return {-1, 0, 0, 0, 0, 0, 0, 0, 0};
  const int per_group = problem.heads_together * problem.row_blocks;
  const int first = index / per_group * problem.heads_together, rest = index % per_group;
  const int heads = min(problem.heads_together, problem.all_heads - first);
  const int block = problem.row_blocks - 1 - rest / heads;
  Item item{first + rest % heads, block * ROWS, 0, 0, 0, problem.num_queries, 0,
            problem.num_keys, 0};
  if (PACKED) {
    const Sequence of = sequence_of<ROWS>(problem.q_starts, problem.num_sequences, block);
    item.rows = (block - of.slot) * ROWS;
    item.sequence = of.number, item.first_query = of.start, item.num_queries = of.length;
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

// Where FIRST_KEYS, the first keys that two rows see, 8 apart, and the last of the warpgroup's rows.
struct FirstKeys {
  int own[2], last;

  __device__ void read(const Problem& problem, const Item& item, int first_row, int row) {
    if (!FIRST_KEYS) return;
    const int most = problem.num_queries - 1;
    const int* keys = problem.first_keys + (i64)(item.head / problem.num_heads) * (most + 1);
    UNROLL for (int h = 0; h < 2; h++) own[h] = keys[min(row + 8 * h, most)];
    last = keys[min(first_row + 63, most)];
  }
};
