// A tile in registers: each lane reads the vectors that it holds as operands.
#pragma once

constexpr int KEY_SLOTS = TILE_BLOCKS * ROWS * KEY_ROUNDS;
constexpr int ROUND_SLOTS = PACKED ? ROWS : 4 * TILE_BLOCKS;
static_assert(STAGES == 1, "registers hold one tile");

struct Tiles {
  Chunk<16> keys[KEY_SLOTS];
  Chunk<VALUE_BYTES> values[VALUE_ROUNDS * ROUND_SLOTS];
};

#define SIMT_TILES(tiles) Tiles tiles
SIMT_DEVICE void begin_tiles(Tiles&) {}

// Zeros where not `inside`; `readable` is any valid address.
template <int BYTES>
SIMT_DEVICE void read(const char* from, bool inside, const char* readable, Chunk<BYTES>& to) {
  const Chunk<BYTES> chunk = *(const Chunk<BYTES>*)(inside ? from : readable);
  UNROLL for (int i = 0; i < BYTES / 4; i++) to.words[i] = inside ? chunk.words[i] : 0;
}

SIMT_DEVICE void ask_keys(Tiles& tiles, int, const Pages& pages, const u32 (&offsets)[DEALT]) {
  UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
    UNROLL for (int h = 0; h < ROWS; h++) {
      const int row = a_row(h);
      const u32 offset = from_place(offsets, place_in_tile(s, quarter_of(row), place_of(row)));
      const char* key = pages.keys + (u64)offset * 16;
      UNROLL for (int i = 0; i < KEY_ROUNDS; i++) {
        const int chunk = lane_quarter() + 4 * i;
        const bool inside = offset != NOWHERE && (D % (4 * PACK) == 0 || chunk < D / PACK);
        const u32 step = PACKED ? chunk * pages.key_chunk : chunk;
        read(key + (u64)step * 16, inside, pages.keys, tiles.keys[(s * ROWS + h) * KEY_ROUNDS + i]);
      }
    }
}

SIMT_DEVICE void ask_values(Tiles& tiles, int, const Pages& pages, const u32 (&offsets)[DEALT]) {
  constexpr int VECTORS = PACKED ? DV : DV / VEC;
  UNROLL for (int s = 0; s < (PACKED ? 1 : TILE_BLOCKS); s++)
    UNROLL for (int e = 0; e < (PACKED ? 1 : 4); e++) {
      const u32 offset = from_place(offsets, place_in_tile(s, lane_quarter(), e));
      const char* value = pages.values + (u64)offset * 16;
      UNROLL for (int i = 0; i < VALUE_ROUNDS; i++)
        UNROLL for (int h = 0; h < (PACKED ? ROWS : 1); h++) {
          const int vector = PACKED ? i * 16 + a_row(h) : i * GROUPS + lane_group();
          const bool inside = offset != NOWHERE && vector < VECTORS;
          const u32 step = PACKED ? vector * pages.value_chunk * 16 : vector * VALUE_BYTES;
          read(value + step, inside, pages.values,
               tiles.values[i * ROUND_SLOTS + (PACKED ? h : 4 * s + e)]);
        }
    }
}

SIMT_DEVICE void ask_tile(Tiles& tiles, int stage, const Pages& pages, const u32 (&keys)[DEALT],
                          const u32 (&values)[DEALT]) {
  ask_keys(tiles, stage, pages, keys);
  ask_values(tiles, stage, pages, values);
}

SIMT_DEVICE void close_tile(Tiles&) {}
SIMT_DEVICE void wait_for_tile(Tiles&, int, u32) {}

SIMT_DEVICE Chunk<16> key_chunk(const Tiles& tiles, int, int s, int h, int i) {
  return tiles.keys[(s * ROWS + h) * KEY_ROUNDS + i];
}
SIMT_DEVICE Chunk<VALUE_BYTES> value_chunk(const Tiles& tiles, int, int s, int i, int n) {
  return tiles.values[i * ROUND_SLOTS + (PACKED ? n : 4 * s + n)];
}
