// Tiles of keys and values as operands of products.
//
// Scores are S^T = K Q^T, results O^T = V^T P^T: keys and values are operands A, whose places are
// vectors as they lie in the cache. Which element of a key goes to which place of the inner
// dimension is free, as long as queries follow; so are the rows of V^T and the tokens' order.
//
//   paged:   four tokens in a lane for each 16; a value's vector is VALUE_VEC of its elements
//   packed:  PACK tokens side by side in a lane, of one element of the values; or, where lanes share
//            vectors (SPREAD), a word of each of four packs
#pragma once

#include "decode_mask.h"
#include "decode_ranges.h"

constexpr int PACK = 16 / (int)sizeof(CACHE), TILE_BLOCKS = TILE / 16, GROUPS = WAVE / 4;
constexpr int KEY_ROUNDS = (D / PACK + 3) / 4, KEY_STEPS = PACK / 4;
constexpr int VEC = PACKED ? ROWS : VALUE_VEC;  // elements of a value in a lane, a round
constexpr int VALUE_ROUNDS = (DV + GROUPS * VEC - 1) / (GROUPS * VEC);
constexpr int ROUND_BLOCKS = VEC / ROWS, VALUE_BLOCKS = VALUE_ROUNDS * ROUND_BLOCKS;
constexpr int VALUE_BYTES = PACKED ? 16 : VALUE_VEC * (int)sizeof(CACHE);
constexpr int VALUE_CHUNKS = PACKED ? ROWS : 4;  // vectors of values in a lane, a round
static_assert(TILE % 16 == 0 && (!PACKED || TILE == 4 * PACK), "whole blocks, one pack a quarter");
static_assert(D % PACK == 0 && DV % PACK == 0 && (!PACKED || PAGE % PACK == 0), "whole vectors");

template <class T> struct OperandOf { typedef fp16 type; };
template <> struct OperandOf<bf16> { typedef bf16 type; };
typedef OperandOf<CACHE>::type OPERAND;

// On NVIDIA the packed layout is what ldmatrix deals out: a word of a vector to each quarter.
#if defined(__HIP__) || defined(__HIPCC_RTC__)
constexpr bool SPREAD = false;
#else
constexpr bool SPREAD = PACKED;
#endif
constexpr int WORD = 4 / (int)sizeof(CACHE);  // elements of the cache in 32 bits

// Of four packs side by side, the one that is n-th of the PACK that quarter j holds.
SIMT_DEVICE int held(int n, int j) {
  return SPREAD ? PACK * (n / WORD) + WORD * j + n % WORD : PACK * j + n;
}

// The token of a tile that place e of quarter j has in block s of 16.
SIMT_DEVICE int place_in_tile(int s, int j, int e) {
  return PACKED ? held(4 * s + e, j) : 16 * s + 4 * j + e;
}

// Tokens that are read together, keys and values: a pack, or those side by side in a page.
constexpr int BESIDE = !SPREAD ? PACKED ? PACK : 1 : PAGE % TILE == 0 ? TILE : PAGE & -PAGE;

// Table entries and masks are read by the lanes in turn.
constexpr int DEALT = (TILE + WAVE - 1) / WAVE;
SIMT_DEVICE int dealt_place(int i) { return i * WAVE + lane(); }
SIMT_DEVICE u32 from_place(const u32 (&x)[DEALT], int place) {
  u32 found = shuffle(x[0], place % WAVE);
  UNROLL for (int i = 1; i < DEALT; i++) {
    const u32 other = shuffle(x[i], place % WAVE);
    if (place >= i * WAVE) found = other;
  }
  return found;
}

// The places of a tile whose tokens are seen.
struct Seen {
  i32 first, end;
  bool all;

  SIMT_DEVICE Seen of(const Cursor& cursor) {
    const i32 begin = Cursor::begin(cursor);
    const i32 first = cursor.sequence.first - begin, end = cursor.sequence.length - begin;
    return {first, end, first <= 0 && end >= TILE};
  }
};

// What a mask adds to the scores of a tile's tokens, in units of log2, as they are dealt.
struct Biases {
  u32 of[DEALT];
};

SIMT_DEVICE Biases biases_of(const MASK* mask, i64 stride, const Cursor& cursor,
                             const Seen& seen) {
  Biases biases;
  if constexpr (MASKED)
    UNROLL for (int i = 0; i < DEALT; i++) {
      const int place = dealt_place(i);
      const bool inside = place < TILE && place >= seen.first && place < seen.end;
      const float bias = inside ? mask_bias(mask[(Cursor::begin(cursor) + place) * stride]) : 0.0f;
      biases.of[i] = bits_of(bias * LOG2_E);
    }
  return biases;
}

struct Pages {
  const char *keys, *values;  // of the wave's head
  const i32* tables;
  i64 tables_seq;
  u32 key_page, key_token, key_chunk, value_page, value_token, value_chunk;  // in 16 bytes
};

struct PageNumbers {
  i32 of[DEALT];
};

constexpr u32 NOWHERE = ~0u;

// Whether any of the TOKENS that are read together with that at `place` is seen.
template <int TOKENS> SIMT_DEVICE bool near(const Seen& seen, int place) {
  const int first = place / TOKENS * TOKENS;
  return place < TILE && first + TOKENS > seen.first && first < seen.end;
}

SIMT_DEVICE PageNumbers page_numbers(const Pages& pages, const Cursor& cursor) {
  PageNumbers numbers;
  const Seen seen = Seen::of(cursor);
  UNROLL for (int i = 0; i < DEALT; i++) {
    const int place = dealt_place(i);
    numbers.of[i] = DENSE ? cursor.seq : 0;
    if (!DENSE && near<BESIDE>(seen, place))
      numbers.of[i] = pages.tables[cursor.seq * pages.tables_seq +
                                   (Cursor::begin(cursor) + place) / PAGE];
  }
  return numbers;
}

#if defined(__HIP__) || defined(__HIPCC_RTC__)
#include "decode_registers.h"
#elif PACKED
#include "decode_packed.h"
#else
#include "decode_shared.h"
#endif

// Ask for the tile at `ahead`, if the range has it, and step to the next, whose page numbers are
// then on their way.
template <class Held>
SIMT_DEVICE void ask_next(Held& tiles, int stage, const Pages& pages, const Lengths& all,
                          Cursor& ahead, PageNumbers& numbers, i32& left) {
  if (left > 0) {
    const Seen seen = Seen::of(ahead);
    u32 keys[DEALT], values[DEALT];
    UNROLL for (int i = 0; i < DEALT; i++) {
      const int place = dealt_place(i);
      const u32 page = (u32)numbers.of[i], token = (u32)(Cursor::begin(ahead) + place);
      const u32 in_page = DENSE ? token : token % PAGE;
      const u32 key = page * pages.key_page + in_page * pages.key_token;
      const u32 value = page * pages.value_page + in_page / (PACKED ? PACK : 1) * pages.value_token;
      keys[i] = near<SPREAD ? BESIDE : 1>(seen, place) ? key : NOWHERE;
      values[i] = near<PACKED ? PACK : 1>(seen, place) ? value : NOWHERE;
    }
    ask_tile(tiles, stage, pages, keys, values);
    if (--left > 0) {
      Cursor::advance(ahead, all);
      numbers = page_numbers(pages, ahead);
    }
  }
  close_tile(tiles);
}

// Elements 4 step to 4 step + 3 of a vector, as an operand's pairs.
template <int BYTES>
SIMT_DEVICE void four_elements(const Chunk<BYTES>& chunk, int step, u32 (&pairs)[2]) {
  if constexpr (sizeof(CACHE) == 1) {
    pairs[0] = fp8_pair<CACHE>(chunk.words[step], false);
    pairs[1] = fp8_pair<CACHE>(chunk.words[step], true);
  } else {
    pairs[0] = chunk.words[2 * step];
    pairs[1] = chunk.words[2 * step + 1];
  }
}

// The vectors of one round of values: of four tokens, or of ROWS elements.
struct Values {
  Chunk<VALUE_BYTES> chunks[VALUE_CHUNKS];
};

// Ones where the tokens of a packed vector's word are seen.
SIMT_DEVICE u32 seen_mask(const Seen& seen, int word) {
  constexpr int EACH = 4 / (int)sizeof(CACHE), BITS = 32 / EACH;
  u32 mask = 0;
  UNROLL for (int e = 0; e < EACH; e++) {
    const int place = held(word * EACH + e, lane_quarter());
    if (place >= seen.first && place < seen.end) mask |= (~0u >> (32 - BITS)) << (BITS * e);
  }
  return mask;
}

// ALL: every token of the tile is seen; those beside the seen ones may be NaN.
template <bool ALL>
SIMT_DEVICE void load_values(const Tiles& tiles, int stage, int s, int i,
                             const Seen& seen, Values& values) {
  UNROLL for (int n = 0; n < VALUE_CHUNKS; n++)
    values.chunks[n] = value_chunk(tiles, stage, s, i, n);
  if constexpr (PACKED && !ALL)
    UNROLL for (int word = 0; word < 4; word++)
      UNROLL for (int n = 0; n < ROWS; n++) values.chunks[n].words[word] &= seen_mask(seen, word);
}

// One element of four tokens, as an operand's pairs: element `n` of the round.
SIMT_DEVICE void four_tokens(const Values& values, int s, int n, u32 (&pairs)[2]) {
  if constexpr (PACKED) {
    four_elements(values.chunks[n], s, pairs);
  } else {
    UNROLL for (int pair = 0; pair < 2; pair++) {
      const Chunk<VALUE_BYTES>& x = values.chunks[2 * pair];
      const Chunk<VALUE_BYTES>& y = values.chunks[2 * pair + 1];
      if constexpr (sizeof(CACHE) == 1) {
        const u32 both = interleave(x.words[n / 4], y.words[n / 4], n % 4 < 2 ? 0x5140 : 0x7362);
        pairs[pair] = fp8_pair<CACHE>(both, n % 2);
      } else {
        pairs[pair] = interleave(x.words[n / 2], y.words[n / 2], n % 2 ? 0x7632 : 0x5410);
      }
    }
  }
}

// The element of a value that row `row` of block i of V^T is.
SIMT_DEVICE int value_element(int i, int row) {
  if constexpr (PACKED) return 16 * i + row;
  const int group = ROWS == 1 ? row : row % 8, h = ROWS == 1 ? 0 : row / 8;
  return (i / ROUND_BLOCKS * GROUPS + group) * VEC + i % ROUND_BLOCKS * ROWS + h;
}
