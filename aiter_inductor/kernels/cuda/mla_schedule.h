// How the keys of many sequences are divided among clusters, so that all of these end together.
//
// The tiles of all sequences stand in a line, and before those of each sequence `start` empty
// places, because to begin with a sequence takes as long as some tiles. Each cluster takes `share`
// places, and so parts of one sequence or more; a part of a cut sequence has a slot for its sums.
#pragma once

#include "mla.h"

// Which clusters have parts of a sequence: `count` of them from `cluster` on.
struct alignas(16) Cut {
  u32 sequence, cluster, count, unused;
};

struct Schedule {
  const int* lengths;  // keys of each sequence; null where each has kv_len
  u32 sequences, kv_len, clusters, start, share;

  __device__ __forceinline__ u32 length(u32 sequence) const {
    return lengths ? lengths[sequence] : kv_len;
  }
  // One tile of an empty sequence too: somebody has to write its zeros.
  static __device__ __forceinline__ u32 tiles_of(u32 length) {
    return max(ceil_div(length, KEYS), 1u);
  }
  __device__ __forceinline__ u32 places_of(u32 length) const { return start + tiles_of(length); }

  // Where all sequences are as long: the cut of sequence `entry`, or, unless `of_sequence`, of the
  // one that cluster `entry` begins with and does not end.
  __device__ __forceinline__ Cut cut(u32 entry, u32 of_sequence) const {
    const u32 tiles = tiles_of(kv_len), places = start + tiles;
    const u32 sequence = of_sequence ? entry : ((entry + 1) * share - 1) / places;
    const u32 tile_0 = sequence * places + start, cluster = tile_0 / share;
    const bool none = sequence >= sequences || (!of_sequence && cluster != entry);
    return {sequence, cluster, none ? 0 : (tile_0 + tiles - 1) / share - cluster + 1};
  }
};

// What the keys of one sequence are to one cluster.
struct Piece {
  u32 sequence, kv_len;
  u32 first, tiles;  // of the sequence's
  u32 slot;          // for the sums of a cut sequence; else WHOLE
};
constexpr u32 WHOLE = ~0u;

// Where the sums of a cluster lie: those of a sequence that it does not begin with come first.
DEVICE u32 slot_of(u32 cluster, bool begins) { return 2 * cluster + begins; }

// A warp's sum and inclusive prefix sum.
DEVICE u32 warp_sum(u32 x) {
  UNROLL for (u32 lanes = 16; lanes != 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}
DEVICE u32 warp_prefix(u32 x) {
  UNROLL for (u32 lanes = 1; lanes != WARP; lanes *= 2) {
    const u32 before = __shfl_up_sync(~0u, x, lanes);
    if (threadIdx.x % WARP >= lanes) x += before;
  }
  return x;
}

// Walks over the pieces of a cluster. One warp finds the first; one lane walks on.
struct Walk {
  u32 begin, end;        // the cluster's places
  u32 sequence, before;  // places before this sequence's
  u32 kv_len;

  // Of a schedule whose `share` is the least that a cluster takes; makes it the share.
  __device__ void find_first(Schedule& schedule, u32 cluster) {
    const u32 lane = threadIdx.x % WARP, count = schedule.sequences;
    u32 all = 0;
    if (schedule.lengths) {
      for (u32 i = lane; i < count; i += WARP) all += schedule.places_of(schedule.lengths[i]);
      all = warp_sum(all);
    } else {
      all = count * schedule.places_of(schedule.kv_len);
    }
    schedule.share = max(ceil_div(all, schedule.clusters), schedule.share);
    begin = cluster * schedule.share, end = begin + schedule.share;
    sequence = before = 0, kv_len = schedule.kv_len;
    if (begin >= all) {
      sequence = count;
    } else if (schedule.lengths) {
      for (u32 base = 0;; base += WARP) {
        const u32 length = base + lane < count ? schedule.lengths[base + lane] : 0;
        const u32 places = base + lane < count ? schedule.places_of(length) : 0;
        const u32 after = before + warp_prefix(places);
        const u32 found = __ballot_sync(~0u, after > begin);
        if (found != 0) {
          const u32 first = __ffs(found) - 1;
          sequence = base + first;
          before = __shfl_sync(~0u, after - places, first);
          kv_len = __shfl_sync(~0u, length, first);
          break;
        }
        before = __shfl_sync(~0u, after, WARP - 1);
      }
    } else {
      sequence = begin / schedule.places_of(kv_len);
      before = sequence * schedule.places_of(kv_len);
    }
  }

  __device__ __forceinline__ bool ended(const Schedule& schedule) const {
    return sequence >= schedule.sequences || before + schedule.start >= end;
  }

  __device__ __forceinline__ Piece piece(const Schedule& schedule, u32 cluster) const {
    const u32 tile_0 = before + schedule.start, tiles = Schedule::tiles_of(kv_len);
    const u32 from = begin > tile_0 ? begin - tile_0 : 0, to = min(end - tile_0, tiles);
    const u32 slot = from == 0 && to == tiles ? WHOLE : slot_of(cluster, from == 0);
    return {sequence, kv_len, from, to - from, slot};
  }

  // How many clusters have parts of this sequence, with whose first tile this one begins.
  __device__ __forceinline__ u32 parts(const Schedule& schedule, u32 cluster) const {
    const u32 last = before + schedule.places_of(kv_len) - 1;
    return last / schedule.share - cluster + 1;
  }

  __device__ __forceinline__ void next(const Schedule& schedule) {
    before += schedule.places_of(kv_len);
    if (++sequence < schedule.sequences) kv_len = schedule.length(sequence);
  }
};
