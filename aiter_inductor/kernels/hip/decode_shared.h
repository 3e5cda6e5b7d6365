// Tiles of rows in shared memory, by asynchronous copies of which one instruction reads 512 bytes,
// whole rows side by side: pieces of 128 bytes came at 0.8 of the rate of a copy. A wave takes only
// what it asked for, so that none waits for another.
//
// Vectors are permuted within eight so that eight lanes that write, those of a row or one of eight
// tokens, and eight that read find eight different places.
#pragma once

constexpr int eights(int x) { return (x + 7) / 8 * 8; }

constexpr int KEY_ROW = D / PACK, VALUE_ROW = DV / PACK;  // vectors
constexpr int KEY_PITCH = eights(KEY_ROUNDS * 4), VALUE_PITCH = eights(VALUE_ROW);
constexpr int KEY_BYTES = TILE * KEY_PITCH * 16;
constexpr int TILE_BYTES = KEY_BYTES + TILE * VALUE_PITCH * 16;
static_assert(STAGES > 1, "one tile is used while the next is copied");
static_assert(TILE % WAVE == 0, "whole instructions");

struct Tiles {
  u32 base;  // shared address of the wave's first
};

extern __shared__ char dynamic_shared[];
#define SIMT_TILES(tiles)                                            \
  const Tiles tiles{(u32)__cvta_generic_to_shared(dynamic_shared) +  \
                    thread_index() / WAVE * (STAGES * TILE_BYTES)}

SIMT_DEVICE u32 key_address(const Tiles& tiles, int stage, int token, int vector) {
  const int permuted = vector ^ ((token & 1) << 2 | (token >> 1 & 3));
  return tiles.base + stage * TILE_BYTES + (token * KEY_PITCH + permuted) * 16;
}
SIMT_DEVICE u32 value_address(const Tiles& tiles, int stage, int token, int vector) {
  const int permuted = vector ^ (token >> 2 & 3) << 1;
  return tiles.base + stage * TILE_BYTES + KEY_BYTES + (token * VALUE_PITCH + permuted) * 16;
}

// Zeros where not `inside`; `readable` is any valid address.
SIMT_DEVICE void copy(u32 to, const char* from, bool inside, const char* readable) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(inside ? from : readable), "r"(inside ? 16 : 0));
}

// Rows of ROW vectors, one a token, lane by lane.
template <bool KEYS>
SIMT_DEVICE void ask_rows(const Tiles& tiles, int stage, const char* base,
                          const u32 (&offsets)[DEALT]) {
  constexpr int ROW = KEYS ? KEY_ROW : VALUE_ROW;
  UNROLL for (int n = 0; n < TILE * ROW / WAVE; n++) {
    const int token = (n * WAVE + lane()) / ROW, vector = (n * WAVE + lane()) % ROW;
    const u32 offset = WAVE % ROW == 0 ? shuffle(offsets[n / ROW], token % WAVE)
                                       : from_place(offsets, token);
    const u32 to = KEYS ? key_address(tiles, stage, token, vector)
                        : value_address(tiles, stage, token, vector);
    copy(to, base + (u64)offset * 16 + vector * 16, offset != NOWHERE, base);
  }
}

SIMT_DEVICE void begin_tiles(const Tiles&) {}

SIMT_DEVICE void ask_tile(const Tiles& tiles, int stage, const Pages& pages,
                          const u32 (&keys)[DEALT], const u32 (&values)[DEALT]) {
  __syncwarp();  // no lane reads the tile that was here any more
  ask_rows<true>(tiles, stage, pages.keys, keys);
  ask_rows<false>(tiles, stage, pages.values, values);
}

SIMT_DEVICE void close_tile(const Tiles&) { asm volatile("cp.async.commit_group;"); }

// Until all but the youngest STAGES - 1 tiles are there.
SIMT_DEVICE void wait_for_tile(const Tiles&, int, u32) {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
  __syncwarp();
}

template <int BYTES> SIMT_DEVICE Chunk<BYTES> taken(u32 from) {
  Chunk<BYTES> chunk;
  if constexpr (BYTES == 16)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]),
                   "=r"(chunk.words[3])
                 : "r"(from));
  else
    UNROLL for (int i = 0; i < BYTES / 4; i++)
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(chunk.words[i]) : "r"(from + 4 * i));
  return chunk;
}

SIMT_DEVICE Chunk<16> key_chunk(const Tiles& tiles, int stage, int s, int h, int i) {
  const int row = a_row(h), token = place_in_tile(s, quarter_of(row), place_of(row));
  const int vector = lane_quarter() + 4 * i;
  Chunk<16> chunk = taken<16>(key_address(tiles, stage, token, vector));
  if constexpr (D % (4 * PACK) != 0)  // beyond the row there may be NaN
    UNROLL for (int word = 0; word < 4; word++)
      if (vector >= D / PACK) chunk.words[word] = 0;
  return chunk;
}
SIMT_DEVICE Chunk<VALUE_BYTES> value_chunk(const Tiles& tiles, int stage, int s, int i, int n) {
  const int byte = (i * GROUPS + lane_group()) * VALUE_BYTES;
  const int token = place_in_tile(s, lane_quarter(), n);
  return taken<VALUE_BYTES>(value_address(tiles, stage, token, byte / 16) + byte % 16);
}
