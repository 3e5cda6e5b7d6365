// Latent rows of e4m3: TMA brings their bytes into the place of a tile, and the warpgroups that
// hold the sums make fp16 of them there, which has every e4m3 number. Queries become fp16 too.
#pragma once

#include "mla_load.h"

constexpr u32 CONVERTERS = 2 * WARPGROUP;

DEVICE void load_chunk(u32 (&x)[4], u32 from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

// Two e4m3 numbers, the low or the high ones of four, to fp16.
DEVICE u32 widen(u32 four, u32 high) {
  u32 two;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)(four >> high * 16)));
  return two;
}

// 16 numbers, chunk `chunk` of 128 columns, into the two slabs of these columns. Chunks of the
// second one store their halves the other way round: no bank conflicts.
DEVICE void store_widened(const u32 (&x)[4], u32 slabs, u32 row, u32 chunk) {
  const u32 slab = slabs + chunk / 4 * SLAB;
  UNROLL for (u32 i = 0; i < 2; i++) {
    const u32 half = i ^ chunk / 4, a = half ? x[2] : x[0], b = half ? x[3] : x[1];
    const u32 to = slab + swizzle_128(row, chunk % 4 * 2 + half);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(widen(a, 0)),
                 "r"(widen(a, 1)), "r"(widen(b, 0)), "r"(widen(b, 1))
                 : "memory");
  }
}

// 128 columns of a tile, whose bytes lie in slab `from`, into two slabs of its place.
DEVICE void widen_columns(u32 from, u32 slabs, u32 thread) {
  UNROLL for (u32 i = 0; i < 2; i++) {
    u32 x[4];
    load_chunk(x, from + swizzle_128(thread / 8 + i * 32, thread % 8));
    store_widened(x, slabs, thread / 8 + i * 32, thread % 8);
  }
}

// A tile whose bytes lie in its slabs from BYTES_AT on: the rotated columns, which are but half a
// slab, then the others. Slabs are overwritten when all threads have read what they hold.
DEVICE void widen_tile(u32 tile) {
  const u32 thread = thread_in_block() - LOADING_THREAD;
  const u32 rotated = tile + BYTES_AT * SLAB, bytes = rotated + SLAB;
  u32 last[4];
  load_chunk(last, rotated + swizzle_128(thread / 4, thread % 4));
  widen_columns(bytes, tile, thread);
  widen_columns(bytes + SLAB, tile + 2 * SLAB, thread);
  UNROLL for (u32 i = 2; i < 4; i++) {
    named_sync(4, CONVERTERS);
    widen_columns(bytes + i * SLAB, tile + 2 * i * SLAB, thread);
  }
  named_sync(4, CONVERTERS);
  store_widened(last, tile + SLABS * SLAB, thread / 4, thread % 4);
  fence_shared();
}

// Item `item` of a piece of `tiles` tiles is next, in place `ring`: makes fp16 of the item two
// further, if it is a tile.
DEVICE void widen_ahead(const Shared& shared, KeyRing ring, u32 item, u32 tiles, u32 number) {
  bool keys = item + 2 <= tiles;
  ring.next();
  if (item == tiles + 1) {  // then come the next piece's queries and first tile
    ring.wait_full();
    keys = shared.loader().pieces[(number + 1) % 2].tiles != 0;
  }
  ring.next();
  if (keys) {
    ring.wait_full();
    widen_tile(shared.tile(ring.place));
  }
  release(shared.ready(ring));
}

// The first two items.
DEVICE void widen_first(const Shared& shared) {
  KeyRing ring = shared.ring();
  release(shared.ready(ring));
  ring.wait_full();
  if (shared.loader().pieces[0].tiles == 0) return;
  ring.next();
  ring.wait_full();
  widen_tile(shared.tile(ring.place));
  release(shared.ready(ring));
}

DEVICE u32 highest_of(u32 a, u32 b) {
  u32 x;
  asm("max.u16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b & 0x7fff7fff));
  return x;
}

// The factors, powers of 2, that bring the highest number of each of a thread's two rows to 2^14
// and more, where fp16 loses none that counts; `scale` becomes what scores are then multiplied by.
DEVICE void scale_queries(float (&factor)[2], float (&scale)[2], const u32 (&highest)[2]) {
  UNROLL for (u32 h = 0; h < 2; h++) {
    u32 bits = max(highest[h] & 0xffff, highest[h] >> 16);
    bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
    bits = max(bits, __shfl_xor_sync(~0u, bits, 2));
    const u32 exponent = max(bits >> 7, 27u);
    factor[h] = __uint_as_float((268 - exponent) << 23);
    if (scale[h] < 0.0f) factor[h] = -factor[h];
    scale[h] = fabsf(scale[h]) * __uint_as_float((exponent - 14) << 23);
  }
}

// Makes fp16 of the bf16 queries in place, each warp of its own 16 rows; a thread's two rows as
// ldmatrix gives them get scales of their own.
DEVICE void queries_to_fp16(float (&scale)[2], const Shared& shared, u32 place) {
  const u32 thread = thread_in_block(), lane = thread % WARP, warp = thread / WARP;
  auto address = [&](u32 k) {
    const u32 slab = k < 4 ? shared.queries() : shared.tile(place) + k / 4 * SLAB;
    return slab + swizzle_128(warp * 16 + lane % 16, k % 4 * 2 + lane / 16);
  };
  u32 highest[2] = {0, 0}, x[4];
  float factor[2];
  _Pragma("unroll 4") for (u32 k = 0; k < STEPS; k++) {
    ldmatrix_x4(x, address(k));
    UNROLL for (u32 i = 0; i < 4; i++) highest[i % 2] = highest_of(highest[i % 2], x[i]);
  }
  scale_queries(factor, scale, highest);
  _Pragma("unroll 4") for (u32 k = 0; k < STEPS; k++) {
    ldmatrix_x4(x, address(k));
    UNROLL for (u32 i = 0; i < 4; i++)
      x[i] = pack_fp16(__uint_as_float(x[i] << 16) * factor[i % 2],
                       __uint_as_float(x[i] & 0xffff0000) * factor[i % 2]);
    stmatrix_x4(address(k), x[0], x[1], x[2], x[3]);
  }
  __syncwarp();
}
