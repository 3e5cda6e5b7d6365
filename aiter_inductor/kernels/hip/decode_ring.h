// Tiles on their way to a wave: in shared memory by asynchronous copies on NVIDIA, in registers on
// AMD. Slots are vectors of up to 16 bytes a lane. A wave reads only what it asked for, so that none
// waits for another; a lane too, but for keys on NVIDIA.
//
//   ask<BYTES>(ring, stage, slot, from, inside, readable)    zeros where not `inside`; `readable` is
//                                any valid address
//   close(ring)                  the vectors asked for since the last close are one tile
//   wait(ring)                   until all but the youngest DEPTH - 1 tiles are there
//   taken<BYTES>(ring, stage, slot)
#pragma once

#include "matrix.h"

#if defined(__HIP__) || defined(__HIPCC_RTC__)

template <int DEPTH, int COUNT> struct Ring {
  static_assert(DEPTH == 1, "registers hold one tile");
  Chunk<16> held[COUNT];

  template <int BYTES> SIMT_DEVICE void ask(Ring& ring, int, int slot, const char* from,
                                            bool inside, const char* readable) {
    const Chunk<BYTES> chunk = *(const Chunk<BYTES>*)(inside ? from : readable);
    UNROLL for (int i = 0; i < BYTES / 4; i++)
      ring.held[slot].words[i] = inside ? chunk.words[i] : 0;
  }
  SIMT_DEVICE void close(Ring&) {}
  SIMT_DEVICE void wait(Ring&) {}
  template <int BYTES> SIMT_DEVICE Chunk<BYTES> taken(const Ring& ring, int, int slot) {
    Chunk<BYTES> chunk;
    UNROLL for (int i = 0; i < BYTES / 4; i++) chunk.words[i] = ring.held[slot].words[i];
    return chunk;
  }
};

#define SIMT_RING(ring, BLOCK_WAVES) Ring<STAGES, SLOTS> ring

#else

// Rows of a token's heads, or packs of a page's tokens, lie side by side: memory may bring more.
#if PACKED
#define L2_HINT ".L2::128B"
#else
#define L2_HINT ".L2::256B"
#endif
template <int DEPTH, int COUNT> struct Ring {
  static_assert(DEPTH > 1, "one tile is used while the next is copied");
  u32 base;  // shared address of the wave's first slot

  SIMT_DEVICE u32 at(const Ring& ring, int stage, int slot) {
    return ring.base + thread_index() % WAVE * 16 + (stage * COUNT + slot) * (WAVE * 16);
  }
  template <int BYTES> SIMT_DEVICE void ask(Ring& ring, int stage, int slot, const char* from,
                                            bool inside, const char* readable) {
    ask_to<BYTES>(at(ring, stage, slot), from, inside, readable);
  }
  template <int BYTES>
  SIMT_DEVICE void ask_to(u32 to, const char* from, bool inside, const char* readable) {
    const int bytes = inside ? BYTES : 0;
    const char* source = inside ? from : readable;
    if constexpr (BYTES == 16)
      asm volatile("cp.async.cg.shared.global" L2_HINT " [%0], [%1], 16, %2;"
                   ::"r"(to), "l"(source), "r"(bytes));
    else
      asm volatile("cp.async.ca.shared.global" L2_HINT " [%0], [%1], %3, %2;"
                   ::"r"(to), "l"(source), "r"(bytes), "n"(BYTES));
  }
  SIMT_DEVICE void close(Ring&) { asm volatile("cp.async.commit_group;"); }
  SIMT_DEVICE void wait(Ring&) {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
  }
  template <int BYTES> SIMT_DEVICE Chunk<BYTES> taken(const Ring& ring, int stage, int slot) {
    return taken_from<BYTES>(at(ring, stage, slot));
  }
  template <int BYTES> SIMT_DEVICE Chunk<BYTES> taken_from(u32 from) {
    Chunk<BYTES> chunk;
    if constexpr (BYTES == 16)
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]),
                     "=r"(chunk.words[3])
                   : "r"(from));
    else
      UNROLL for (int i = 0; i < BYTES / 4; i++)
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(chunk.words[i]) : "r"(from + 4 * i));
    return chunk;
  }
};

extern __shared__ char dynamic_shared[];
#define SIMT_RING(ring, BLOCK_WAVES)                                                             \
  Ring<STAGES, SLOTS> ring;                                                                \
  ring.base = (u32)__cvta_generic_to_shared(dynamic_shared) +                              \
              thread_index() / WAVE * (STAGES * SLOTS * WAVE * 16)

#endif
