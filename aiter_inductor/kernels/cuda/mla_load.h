// What a block of mla.cu keeps in shared memory, and the thread that loads: queries, then tiles of
// keys, of one piece of the schedule after the other.
#pragma once

#include "mla_schedule.h"
#include "ring.h"
#include "tma.h"

constexpr u32 ROWS = 64, ROPE = 64;
constexpr u32 LOADING_THREAD = WARPGROUP;
constexpr u32 PLACES = 3;                 // tiles in shared memory
constexpr u32 SLABS = RANK / 64;          // of 64 columns, as TMA lays them out
constexpr u32 SLAB = KEYS * 128;
constexpr u32 TILE = (SLABS + 1) * SLAB;  // latent slabs and the rotated one
constexpr u32 STEPS = (RANK + ROPE) / 16;
constexpr u32 STEPS_SHARED = 5;  // steps of 16 query columns that find no registers
constexpr u32 BYTES_AT = 4, BYTE_SLABS = 5;  // the slabs into which rows of e4m3 are loaded
constexpr u32 LOADED = FP8 ? BYTE_SLABS * SLAB : TILE;  // bytes of a tile

// Offsets in shared memory; mla.py allocates as much.
constexpr u32 QUERIES_AT = PLACES * TILE;  // STEPS_SHARED steps of the queries
constexpr u32 FACTORS_AT = QUERIES_AT + SLAB + ROWS * 32;
constexpr u32 BARRIERS_AT = FACTORS_AT + 3 * ROWS * 4, LOADER_AT = BARRIERS_AT + 15 * 8;

// A block loads SHARE keys of a tile, in runs that lie one after the other: pages, where there are
// such small ones.
constexpr u32 SHARE = KEYS / BLOCKS, RUN = PAGE != 0 && PAGE < SHARE ? PAGE : SHARE;
constexpr u32 RUNS = SHARE / RUN, PAGE_SIZE = PAGE != 0 ? PAGE : KEYS;

using KeyRing = Ring<PLACES, 3 * 4 * BLOCKS>;  // every warp empties every place

// Read again where it is needed: addresses that are made from it before the main loop, to last over
// it, would not leave enough registers for the queries.
DEVICE u32 thread_in_block() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

DEVICE void store_shared(u32 to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

DEVICE float load_shared(u32 from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

// Counts tiles, and the end of every piece as one more, modulo 3. Weights of one that is 3 further
// are made when both other warpgroups have long been done with this one, whose place its tile took.
struct Turn {
  u32 index = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == 3) index = 0, parity ^= 1;
  }
};

// What the loading thread keeps in shared memory, where it costs no registers: where it is, and
// what the others have to know of the piece that they work on and of the next.
struct Loader {
  Walk walk;
  u32 share, item, number;  // item of the piece: its queries, tiles, and the place for its rows
  Piece pieces[2];
  int pages[RUNS];  // of the next tile
};
constexpr u32 SHARED_BYTES = LOADER_AT + sizeof(Loader);
static_assert(SHARED_BYTES <= 227 * 1024, "a block has so much");

// A block's shared memory at `base`.
struct Shared {
  u8* memory;
  u32 base;

  __device__ u32 tile(u32 place) const { return base + place * TILE; }
  // Its last slab: the rotated columns, in whose place the weights lie once there are scores.
  __device__ u32 rotated(u32 place) const { return tile(place) + SLABS * SLAB; }
  __device__ u32 queries() const { return base + QUERIES_AT; }
  // By what the rows of the sums are multiplied before a tile, or in the end.
  __device__ u32 factors(const Turn& turn) const {
    return base + FACTORS_AT + turn.index * ROWS * 4;
  }
  __device__ KeyRing ring() const { return KeyRing(base + BARRIERS_AT); }
  // The scores of a tile are finished; its weights or the last factors are stored.
  __device__ u32 scored(const Turn& turn) const {
    return base + BARRIERS_AT + KeyRing::BYTES + turn.index * 8;
  }
  __device__ u32 weighed(const Turn& turn) const { return scored(turn) + 3 * 8; }
  // The tile of e4m3 in a place has become fp16.
  __device__ u32 ready(const KeyRing& ring) const {
    return base + BARRIERS_AT + KeyRing::BYTES + (6 + ring.place) * 8;
  }
  __device__ Loader& loader() const { return *(Loader*)(memory + LOADER_AT); }
  __device__ void init() const {
    ring().init();
    for (Turn turn; turn.parity == 0; turn.next()) {
      barrier_init(scored(turn), 4);
      barrier_init(weighed(turn), 4);
    }
    for (KeyRing places = ring(); places.parity == 0; places.next()) barrier_init(ready(places), 8);
    fence_barrier_init();
  }
};

// The pages of every sequence in order; null where there are none.
struct Tables {
  const int* pages;
  i64 sequence;
};

// What is read, and where the loading thread writes how sequences are cut.
struct Inputs {
  const TensorMap &q_latent, &q_rope, &latent, &rotated;
  Tables tables;
  Schedule schedule;
  Cut* cuts;
  u32 cut_of_sequence;  // whether there is one entry a sequence, else one a cluster
};

DEVICE u32 cluster_index() { return blockIdx.x / BLOCKS; }

// Each warp arrives at the barrier of every block that shares the keys.
DEVICE void release_to_sharers(u32 empty) {
  __syncwarp();
  const u32 lane = thread_in_block() % WARP;
  if (lane < BLOCKS) barrier_arrive_remote(empty, lane);
}

// Rows beyond the sequence's become zeros.
DEVICE void load_queries(const Shared& shared, const KeyRing& ring, u32 sequence,
                         const Inputs& inputs) {
  const u32 row = (blockIdx.y * BLOCKS + blockIdx.x % BLOCKS) * ROWS;
  ring.wait_empty();
  barrier_expect(ring.full(), TILE);
  for (u32 i = 0; i < SLABS; i++)
    tma_load_3d(i == 0 ? shared.queries() : shared.tile(ring.place) + i * SLAB, inputs.q_latent,
                ring.full(), i * 64, row, sequence);
  tma_load_3d(shared.rotated(ring.place), inputs.q_rope, ring.full(), 0, row, sequence);
}

// The first key of a run of this block's share of a tile.
DEVICE u32 key_of(const Piece& piece, u32 tile, u32 run) {
  return (piece.first + tile) * KEYS + blockIdx.x % BLOCKS * SHARE + run * RUN;
}

// Fetches the pages of a tile's runs: the next call but one of `load_next` needs them.
DEVICE void fetch_pages(Loader& loader, const Piece& piece, u32 tile, const Tables& tables) {
  if (tile >= piece.tiles) return;
  UNROLL for (u32 run = 0; run < RUNS; run++) {
    const u32 key = key_of(piece, tile, run);
    const i64 at = piece.sequence * tables.sequence + key / PAGE_SIZE;
    if (key < piece.kv_len) copy_word(shared_address(&loader.pages[run]), tables.pages + at);
  }
}

// This block's share of a tile, for all that share it. Keys beyond the sequence become zeros,
// except those of a page that it ends in: there is no page -1, which TMA fills with zeros.
DEVICE void load_tile(const Shared& shared, const KeyRing& ring, u32 tile, const Piece& piece,
                      const Inputs& inputs) {
  Loader& loader = shared.loader();
  const u32 full = ring.full(), at = shared.tile(ring.place) + blockIdx.x % BLOCKS * SHARE * 128;
  const u32 first_key = key_of(piece, tile, 0), sequence = piece.sequence;
  constexpr u32 WIDTH = FP8 ? 128 : 64, LOADS = LOADED / SLAB;  // of 128 bytes each
  const int first_rotated = PAGE != 0 ? RANK : 0;
  if (PAGE != 0) wait_for_words();
  ring.wait_empty();
  barrier_expect(full, LOADED);
  UNROLL for (u32 run = 0; run < RUNS; run++) {
    int row = first_key + run * RUN, outer = sequence;
    if (PAGE != 0) {
      outer = row < piece.kv_len ? *(volatile int*)&loader.pages[run] : -1;
      row %= PAGE_SIZE;
    }
    const u32 to = at + run * RUN * 128;
    for (u32 i = 0; i < LOADS; i++) {
      const u32 slab = !FP8 ? i : i + 1 < LOADS ? BYTES_AT + 1 + i : BYTES_AT;
      const TensorMap& map = i + 1 < LOADS ? inputs.latent : inputs.rotated;
      const int column = i + 1 < LOADS ? i * WIDTH : first_rotated;
      if constexpr (BLOCKS == 1)
        tma_load_3d(to + slab * SLAB, map, full, column, row, outer);
      else
        tma_load_3d_multicast(to + slab * SLAB, map, full, column, row, outer,
                              (1 << BLOCKS) - 1);
    }
  }
  if (PAGE != 0) fetch_pages(loader, piece, tile + 1, inputs.tables);
}

// Notes for `mla_reduce` which clusters have parts of the sequence that this one begins with.
DEVICE void note_cut(const Inputs& inputs, const Walk& walk, const Piece& piece) {
  if (!inputs.cuts || piece.first != 0 || blockIdx.x % BLOCKS != 0 || blockIdx.y != 0) return;
  const u32 cluster = cluster_index(), count = walk.parts(inputs.schedule, cluster);
  const u32 entry = inputs.cut_of_sequence ? piece.sequence : cluster;
  if (inputs.cut_of_sequence || count > 1) inputs.cuts[entry] = {piece.sequence, cluster, count};
}

// Loads the next item of the pieces that this cluster works on into a place, once it is empty:
// queries, tiles, and for the rows in the end nothing. A piece of no tiles comes last.
DEVICE void load_next(const Shared& shared, const KeyRing& ring, Inputs& inputs) {
  Loader& loader = shared.loader();
  Piece& piece = loader.pieces[loader.number % 2];
  const u32 item = loader.item;
  if (item == 0) {
    Walk& walk = loader.walk;
    inputs.schedule.share = loader.share;
    if (walk.ended(inputs.schedule)) {
      piece.tiles = 0;
      loader.item = ~0u;
      ring.wait_empty();
      barrier_arrive(ring.full());
      return;
    }
    const Piece found = walk.piece(inputs.schedule, cluster_index());
    piece = found;
    note_cut(inputs, walk, found);
    if (PAGE != 0) fetch_pages(loader, found, 0, inputs.tables);
    load_queries(shared, ring, found.sequence, inputs);
    walk.next(inputs.schedule);
  } else if (item <= piece.tiles) {
    load_tile(shared, ring, item - 1, piece, inputs);
  } else {
    ring.wait_empty();
    barrier_arrive(ring.full());
    loader.number++;
    loader.item = 0;
    return;
  }
  loader.item = item + 1;
}

// When item `ring` is next: loads into the place of the one before it, once that is empty. Queries
// also wait until the scores of the tile that is next, the last one, are finished.
DEVICE void load_ahead(const Shared& shared, const KeyRing& ring, const Turn& turn,
                       Inputs& inputs) {
  if (thread_in_block() != LOADING_THREAD) return;
  const u32 item = shared.loader().item;
  if (item == ~0u) return;
  if (item == 0) barrier_wait(shared.weighed(turn), turn.parity);
  KeyRing ahead = ring;
  ahead.next();
  ahead.next();
  load_next(shared, ahead, inputs);
}

// One warp's: finds what this cluster works on, and loads its first queries and first tile.
DEVICE void begin_loading(const Shared& shared, Inputs& inputs) {
  Loader& loader = shared.loader();
  Walk walk;
  walk.find_first(inputs.schedule, cluster_index());
  if (threadIdx.x == LOADING_THREAD) {
    KeyRing ring = shared.ring();
    loader.walk = walk;
    loader.share = inputs.schedule.share, loader.item = loader.number = 0;
    if (inputs.cuts && !inputs.cut_of_sequence && blockIdx.x % BLOCKS == 0 && blockIdx.y == 0)
      inputs.cuts[cluster_index()] = {0, 0, 0};
    load_next(shared, ring, inputs);
    ring.next();
    if (loader.item != ~0u) load_next(shared, ring, inputs);
  }
  __syncwarp();
}
