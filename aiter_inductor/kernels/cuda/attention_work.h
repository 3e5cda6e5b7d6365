// What a block of attention.cu keeps in shared memory.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), BLOCK_N
// (keys of a tile, a multiple of 16), WARPGROUPS (that share a tile, 64 queries each), STAGES
// (tiles of keys and of values in flight), CAUSAL, WINDOW, FIRST_KEYS, SOFTCAP, PACKED and FP16 (0
// or 1), SHARED_COLUMNS (the last columns of queries and keys that lie in tensors of their own, all
// heads' keys in one head), and SHARED_BYTES (what the launch asks for).
#pragma once

#include "ring.h"

constexpr int ROWS = 64 * WARPGROUPS;
#include "attention_items.h"

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
