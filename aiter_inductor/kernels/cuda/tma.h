// Bulk tensor copies between global and shared memory. Coordinates are in elements, innermost
// first; what lies outside the tensor is read as zeros and not written.
// PTX ISA, "cp.async.bulk.tensor".
#pragma once

#include "types.h"

DEVICE void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&map) : "memory");
}

// How the L2 keeps what is copied: data read once should not displace data read again.
DEVICE u64 l2_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE u64 l2_evict_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- global to shared; `bar` counts the bytes down. `shared` is aligned to 128 bytes, 1024 under
// a 128-byte swizzle.

DEVICE void tma_load(u32 shared, const TensorMap& map, u32 bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1)
      : "memory");
}

DEVICE void tma_load(u32 shared, const TensorMap& map, u32 bar, int c0, int c1, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}

DEVICE void tma_load_3d(u32 shared, const TensorMap& map, u32 bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

DEVICE void tma_load_4d(u32 shared, const TensorMap& map, u32 bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Into the same place of every block in `blocks`, a bit a rank; each block's own barrier counts.
DEVICE void tma_load_multicast(u32 shared, const TensorMap& map, u32 bar, int c0, int c1,
                               u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

DEVICE void tma_load_3d_multicast(u32 shared, const TensorMap& map, u32 bar, int c0, int c1, int c2,
                                  u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"((u64)&map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// `bytes`, a multiple of 16, from a plain address aligned to 16.
DEVICE void bulk_load(u32 shared, const void* from, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"((u64)from), "r"(bytes), "r"(bar)
      : "memory");
}

DEVICE void bulk_load(u32 shared, const void* from, u32 bytes, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"((u64)from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

// ---- 4 bytes by this thread, aligned to 4, which it may read after `wait_for_words`.

DEVICE void copy_word(u32 shared, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"((u64)from) : "memory");
}
DEVICE void wait_for_words() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- shared to global; the source may be overwritten after `tma_store_wait_read`.

// Ordinary stores to shared memory, made visible to TMA and wgmma; before the barrier between.
DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void tma_store(const TensorMap& map, u32 shared, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   (u64)&map),
               "r"(shared), "r"(c0), "r"(c1)
               : "memory");
}

DEVICE void tma_store_3d(const TensorMap& map, u32 shared, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          (u64)&map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

DEVICE void tma_store_4d(const TensorMap& map, u32 shared, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          (u64)&map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// `bytes`, a multiple of 16, to a plain address aligned to 16.
DEVICE void bulk_store(void* to, u32 shared, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"((u64)to),
               "r"(shared), "r"(bytes)
               : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most PENDING groups of this thread have still to read shared memory.
template <u32 PENDING> DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until at most PENDING groups of this thread have still to reach global memory.
template <u32 PENDING> DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void stmatrix_x4(u32 shared, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
DEVICE void stmatrix_x2(u32 shared, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(a),
               "r"(b)
               : "memory");
}
DEVICE void stmatrix_x4_transposed(u32 shared, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements, addressed as those that stmatrix_x4 writes.
DEVICE void ldmatrix_x4(u32 (&x)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared)
               : "memory");
}

// Byte offset of a 16-byte chunk in rows of 128 bytes as TMA and wgmma lay them out under
// SWIZZLE_128B: the chunk's index is XORed with the row's, modulo 8. The base is 1024-aligned.
DEVICE u32 swizzle_128(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
