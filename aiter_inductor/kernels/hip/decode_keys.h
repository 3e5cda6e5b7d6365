// Keys of a tile. On AMD a lane asks for the vectors that it holds as an operand. On NVIDIA those of
// one instruction are 64 bytes of a row, or 32 in AITER's layout, which memory serves at 0.6 to 0.9
// of the rate of whole lines: eight lanes ask for 128 bytes, and others take them.
#pragma once

#if defined(__HIP__) || defined(__HIPCC_RTC__)

SIMT_DEVICE void ask_keys(Tiles& tiles, int stage, const Pages& pages,
                          const u32 (&offsets)[DEALT]) {
  UNROLL for (int s = 0; s < TILE_BLOCKS; s++)
    UNROLL for (int h = 0; h < ROWS; h++) {
      const int row = a_row(h);
      const u32 offset = from_dealer(offsets, s, quarter_of(row), place_of(row));
      const char* key = pages.keys + (u64)offset * 16;
      UNROLL for (int i = 0; i < KEY_ROUNDS; i++) {
        const int chunk = lane_quarter() + 4 * i;
        const bool inside = offset != NOWHERE && (D % (4 * PACK) == 0 || chunk < D / PACK);
        const u32 step = PACKED ? chunk * pages.key_chunk : chunk;
        Tiles::ask<16>(tiles, stage, (s * ROWS + h) * KEY_ROUNDS + i, key + (u64)step * 16, inside,
                       pages.keys);
      }
    }
}

SIMT_DEVICE Chunk<16> key_chunk(const Tiles& tiles, int stage, int s, int h, int i) {
  return Tiles::taken<16>(tiles, stage, (s * ROWS + h) * KEY_ROUNDS + i);
}

#else

// Vectors of a token in shared memory, so permuted that eight lanes that write those of a token, or
// one of eight tokens, and eight that read four of two tokens, each find eight different places.
constexpr int KEY_PLACES = (KEY_ROUNDS + 1) / 2 * 8;

SIMT_DEVICE u32 key_address(const Tiles& tiles, int stage, int token, int chunk) {
  const int permuted = chunk ^ ((token & 1) << 2 | (token >> 1 & 3));
  return tiles.base + stage * (SLOTS * WAVE * 16) + (token * KEY_PLACES + permuted) * 16;
}

SIMT_DEVICE void ask_keys(Tiles& tiles, int stage, const Pages& pages,
                          const u32 (&offsets)[DEALT]) {
  constexpr int SIDE_BY_SIDE = PACKED ? 8 : 4;  // tokens that one instruction asks for
  UNROLL for (int n = 0; n < TILE / SIDE_BY_SIDE; n++) {
    const int in_step = PACKED ? lane() % 8 : lane() / 8, token = n * SIDE_BY_SIDE + in_step;
    const u32 offset = PACKED ? from_dealer(offsets, n % (PACK / 8) * 2, n / (PACK / 8), in_step)
                              : from_dealer(offsets, n / 4, n % 4, in_step);
    const char* key = pages.keys + (u64)offset * 16;
    UNROLL for (int i = 0; i < KEY_PLACES / (PACKED ? 4 : 8); i++) {
      const int chunk = PACKED ? lane() / 8 + 4 * i : lane() % 8 + 8 * i;
      const bool inside = offset != NOWHERE && (D % (8 * PACK) == 0 || chunk < D / PACK);
      const u32 step = PACKED ? chunk * pages.key_chunk : chunk;
      Tiles::ask_to<16>(key_address(tiles, stage, token, chunk), key + (u64)step * 16, inside,
                        pages.keys);
    }
  }
}

SIMT_DEVICE Chunk<16> key_chunk(const Tiles& tiles, int stage, int s, int h, int i) {
  const int row = a_row(h), token = place_in_tile(s, quarter_of(row), place_of(row));
  return Tiles::taken_from<16>(key_address(tiles, stage, token, lane_quarter() + 4 * i));
}

#endif
