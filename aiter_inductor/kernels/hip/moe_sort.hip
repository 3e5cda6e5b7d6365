// Order (token, slot) entries by expert, stably, each expert's entries padded to whole blocks.
//
// Defined by the build, see moe_sort.py: ID (integer type of the experts), W (type of the weights),
// EXPERTS, BLOCK_M, CHUNK entries of a block of threads, SINGLE (all entries are one chunk),
// THREADS, at least EXPERTS.
//
// Thread e looks through a chunk in LDS for entries of expert e: no atomics, so the order is the
// same in every run, and 512 entries of 256 experts are 64 reads of 16 bytes a thread.
#include "numeric.h"

constexpr u16 NO_EXPERT = 0xffff;
constexpr int EACH = 8;  // expert numbers of 2 bytes in 16 bytes

// The expert numbers of a chunk; those outside 0 to EXPERTS - 1 become NO_EXPERT.
SIMT_DEVICE void load_chunk(const ID* experts, i32 first, i32 entries, u16* chunk) {
  for (int i = thread_index(); i < CHUNK; i += THREADS) {
    const i32 entry = first + i;
    const ID expert = entry < entries ? experts[entry] : (ID)-1;
    chunk[i] = expert >= 0 && expert < EXPERTS ? (u16)expert : NO_EXPERT;
  }
}

SIMT_DEVICE i32 count_in(const u16* chunk, u32 expert) {
  i32 count = 0;
  for (int i = 0; i < CHUNK; i += EACH) {
    const Chunk<16> numbers = *(const Chunk<16>*)(chunk + i);
    UNROLL for (int j = 0; j < EACH; j++) count += element<2>(numbers, j) == expert;
  }
  return count;
}

// Sums over the threads up to this one.
SIMT_DEVICE i32 sum_up_to(i32 x, i32* slots) {
  slots[thread_index()] = x;
  barrier();
  for (int step = 1; step < THREADS; step *= 2) {
    const i32 before = thread_index() >= step ? slots[thread_index() - step] : 0;
    barrier();
    slots[thread_index()] += before;
    barrier();
  }
  return slots[thread_index()];
}

// The expert whose places end behind `place`: the first of larger end, EXPERTS if none has.
SIMT_DEVICE int owner_of(i32 place, const i32* ends) {
  int low = 0, high = EXPERTS;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > place)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

SIMT_KERNEL(THREADS)
moe_count_kernel(const ID* experts, i32* chunk_counts, i32 entries) {
  begin();
  alignas(16) SIMT_SHARED u16 chunk[CHUNK];
  load_chunk(experts, block_x() * CHUNK, entries, chunk);
  barrier();
  const int expert = thread_index();
  if (expert < EXPERTS) chunk_counts[block_x() * EXPERTS + expert] = count_in(chunk, expert);
}
SIMT_ENTRY(moe_count_kernel)

// Every block knows the counts of all chunks; it places its own chunk and pads a share of places.
// Where there is one chunk, each block counts it, and the first one places it.
SIMT_KERNEL(THREADS)
moe_place_kernel(const ID* experts, const W* weights, const i32* chunk_counts, i32* sorted_entries,
                 float* sorted_weights, i32* block_experts, i32* counts, i32* num_sorted,
                 i32 entries, i32 num_chunks, i32 num_blocks, i32 capacity) {
  begin();
  alignas(16) SIMT_SHARED u16 chunk[CHUNK];
  SIMT_SHARED i32 places[CHUNK], slots[THREADS], ends[EXPERTS], used_ends[EXPERTS];
  const i32 first = SINGLE ? 0 : block_x() * CHUNK;
  load_chunk(experts, first, entries, chunk);
  for (int i = thread_index(); i < CHUNK; i += THREADS) places[i] = -1;
  barrier();

  const int expert = thread_index();
  i32 total = 0, before = 0;
  if (expert < EXPERTS) {
    if constexpr (SINGLE) {
      total = count_in(chunk, expert);
    } else {
      for (int c = 0; c < num_chunks; c++) {
        const i32 count = chunk_counts[c * EXPERTS + expert];
        total += count;
        before += c < block_x() ? count : 0;
      }
    }
  }
  const i32 padded = (total + BLOCK_M - 1) / BLOCK_M * BLOCK_M, end = sum_up_to(padded, slots);
  const i32 start = end - padded;
  if (expert < EXPERTS) {
    ends[expert] = end;
    used_ends[expert] = start + total;
    i32 place = start + before;
    for (int i = 0; i < CHUNK; i += EACH) {
      const Chunk<16> numbers = *(const Chunk<16>*)(chunk + i);
      UNROLL for (int j = 0; j < EACH; j++)
        if (element<2>(numbers, j) == (u32)expert) places[i + j] = place++;
    }
    if (block_x() == 0) counts[expert] = total;
    if (block_x() == 0 && expert == EXPERTS - 1) *num_sorted = end;
  }
  barrier();

  for (int i = thread_index(); i < CHUNK && !(SINGLE && block_x()); i += THREADS) {
    if (places[i] < 0) continue;
    float weight[1];
    load(weights + (first + i), weight);
    sorted_entries[places[i]] = first + i;
    sorted_weights[places[i]] = weight[0];
  }
  for (i32 place = block_x() * THREADS + thread_index(); place < capacity;
       place += num_blocks * THREADS) {
    const int owner = owner_of(place, ends);
    if (place % BLOCK_M == 0) block_experts[place / BLOCK_M] = owner < EXPERTS ? owner : -1;
    if (owner < EXPERTS && place < used_ends[owner]) continue;
    sorted_entries[place] = entries;
    sorted_weights[place] = 0.0f;
  }
}
SIMT_ENTRY(moe_place_kernel)
