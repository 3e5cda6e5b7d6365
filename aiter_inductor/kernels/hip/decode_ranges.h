// How the tokens of all sequences are divided: into tiles of TILE tokens, and these, one sequence
// after the other, into ranges of equal length. A wave takes one range of one head. Lengths lie on
// the device, so the division is made there, and a captured graph serves other lengths.
//
// Defined by the build: TILE, LEAST_TILES of a range, DENSE (lengths may be missing: all are one).
#pragma once

#include "matrix.h"

constexpr float INFINITE = __builtin_huge_valf(), LOG2_E = 1.4426950408889634f;

// The tokens of a sequence that are seen: from `first` to `length`; tiles begin at `origin`.
struct Sequence {
  i32 length, first, origin, tiles;
};

struct Lengths {
  const i32* lengths;
  i32 num_seqs, longest, window;  // 0: no window

  SIMT_DEVICE Sequence of(const Lengths& all, i32 seq) {
    i32 length = all.longest;
    if (!DENSE || all.lengths) length = all.lengths[seq];
    if (length < 0) length = 0;
    const i32 first = all.window && length > all.window ? length - all.window : 0;
    const i32 origin = first / TILE * TILE;
    return {length, first, origin, (length - origin + TILE - 1) / TILE};
  }
};

struct Added {
  static constexpr Reduction KIND = Reduction::other;
  SIMT_DEVICE u32 of(u32 a, u32 b) { return a + b; }
};

// Tiles of all sequences; by a whole wave.
SIMT_DEVICE i32 total_tiles(const Lengths& all) {
  i32 tiles = 0;
  for (i32 seq = lane(); seq < all.num_seqs; seq += WAVE) tiles += Lengths::of(all, seq).tiles;
  return uniform((i32)wave_reduce<WAVE, Added>((u32)tiles));
}

// Fewer than there are waves where a range would not have its least tiles.
SIMT_DEVICE i32 used_ranges(i32 total, i32 ranges) {
  const i32 most = total / LEAST_TILES > 1 ? total / LEAST_TILES : 1;
  return ranges < most ? ranges : most;
}
SIMT_DEVICE i32 range_begin(i32 range, i32 total, i32 ranges) {
  return (i32)((u64)range * (u64)total / (u64)ranges);
}
SIMT_DEVICE i32 range_of(i32 tile, i32 total, i32 ranges) {
  return (i32)((((u64)tile + 1) * (u64)ranges - 1) / (u64)total);
}

// A tile of a sequence.
struct Cursor {
  Sequence sequence;
  i32 seq, tile;

  // Of a tile counted over all sequences, there being so many; by a whole wave.
  SIMT_DEVICE Cursor at(const Lengths& all, i32 tile) {
    i32 before = 0;
    for (i32 base = 0;; base += WAVE) {
      const i32 seq = base + lane();
      const i32 tiles = seq < all.num_seqs ? Lengths::of(all, seq).tiles : 0;
      i32 through = tiles;
      UNROLL for (int step = 1; step < WAVE; step *= 2) {
        const i32 lower = (i32)shuffle((u32)through, lane() >= step ? lane() - step : 0);
        if (lane() >= step) through += lower;
      }
      const i32 in_all = uniform((i32)shuffle((u32)through, WAVE - 1));
      if (tile < before + in_all) {
        const i32 begin = before + through - tiles;
        const bool here = tile >= begin && tile < begin + tiles;
        const i32 found = (i32)wave_reduce<WAVE, Largest>(here ? (u32)lane() : 0u);
        Cursor cursor;
        cursor.seq = uniform(base + found);
        cursor.tile = uniform(tile - (i32)shuffle((u32)begin, found));
        cursor.sequence = Lengths::of(all, cursor.seq);
        return cursor;
      }
      before += in_all;
    }
  }

  // To the next tile, which there is.
  SIMT_DEVICE void advance(Cursor& cursor, const Lengths& all) {
    if (++cursor.tile < cursor.sequence.tiles) return;
    cursor.tile = 0;
    do cursor.sequence = Lengths::of(all, ++cursor.seq);
    while (cursor.sequence.tiles == 0);
  }

  SIMT_DEVICE i32 begin(const Cursor& cursor) {
    return cursor.sequence.origin + cursor.tile * TILE;
  }
};

// Where waves leave parts of results for decode_reduce.hip: one allocation of floats, in which the
// starts take as many bytes. A range has at most two parts, so there are 2 * ranges.
struct Workspace {
  float* partial;  // [2 * ranges, num_heads, dv]
  float* lse;      // [2 * ranges, num_heads], in units of log2
  i32* starts;     // [num_seqs + 1]: the first tile of each sequence, counted over all

  SIMT_DEVICE Workspace at(float* workspace, i32 ranges, i32 num_heads, i32 dv) {
    const i64 parts = (i64)2 * ranges * num_heads;
    float* lse = workspace + parts * dv;
    return {workspace, lse, (i32*)(lse + parts)};
  }
};
