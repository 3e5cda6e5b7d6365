// What is known of each LDS byte: who wrote and read it last, between which barriers, and whether
// it holds a defined value. Two waves that touch a byte between the same two barriers, one of them
// writing, race.
#pragma once
#include "checks.hpp"

namespace cdnasim {

// An entry is epoch << 6 | undefined << 5 | wave; zero: never. The epoch counts barriers, from
// FIRST_EPOCH; entries older than the last LAST_EPOCH barriers have epoch 1.
using Entry = u16;
constexpr u32 SHADOW_WAVE = 31, SHADOW_SEVERAL = 31, SHADOW_UNDEFINED = 32, EPOCH_SHIFT = 6;
constexpr u32 ANCIENT_EPOCH = 1, FIRST_EPOCH = 2, LAST_EPOCH = 1023;

struct LdsShadow {
  std::vector<Entry> written, read;
  // Direct-to-LDS loads still in flight, per dword: sequence number and wave + 1.
  std::vector<u32> dma_sequence;
  std::vector<u8> dma_wave;
  bool any_dma = false;

  explicit LdsShadow(size_t bytes)
      : written(bytes + 16), read(bytes + 16), dma_sequence(bytes / 4 + 4), dma_wave(bytes / 4 + 4) {}
  // At the start of each workgroup.
  void reset() {
    std::fill(written.begin(), written.end(), 0);
    std::fill(read.begin(), read.end(), 0);
    if (any_dma) std::fill(dma_wave.begin(), dma_wave.end(), 0);
    any_dma = false;
  }
  // At a barrier: the next epoch, starting over when the field is full.
  u32 next_epoch(u32 epoch) {
    if (epoch < LAST_EPOCH) return epoch + 1;
    constexpr u32 low = (1 << EPOCH_SHIFT) - 1;
    for (Entry& e : written) e = e ? (Entry)(ANCIENT_EPOCH << EPOCH_SHIFT | (e & low)) : 0;
    std::fill(read.begin(), read.end(), 0);
    return FIRST_EPOCH;
  }
};

inline u32 shadow_tag(const Wave& w) { return w.group->epoch << EPOCH_SHIFT | w.index; }
// True when `entry` was made between the same barriers by another wave.
inline u32 foreign(u32 entry, u32 tag) {
  u32 difference = (entry ^ tag) & ~SHADOW_UNDEFINED;
  return difference - 1 < SHADOW_WAVE;
}

void report_race(Wave& w, const Ins& I, int lane, u32 offset, int bytes, bool writing);
void check_dma(Wave& w, const Ins& I, int lane, u32 offset, int bytes);

// What a lane is about to store; null for direct-to-LDS loads.
struct StoredData {
  const Arg* from;
  const Shape* shape;
};
// Several waves may store the same value to the same place: replicated layouts do.
bool stores_what_is_there(Wave& w, const StoredData& data, int lane, u32 offset, int bytes);

// Note a read; returns whether any byte is undefined. Entries are copied to and from local arrays,
// which lets the compiler use one vector register for all of them.
template <int BYTES>
inline bool shadow_read(Wave& w, const Ins& I, int lane, u32 offset) {
  LdsShadow& shadow = *w.group->shadow;
  u32 tag = shadow_tag(w), race = 0, undefined = 0;
  Entry written[BYTES], read[BYTES];
  memcpy(written, &shadow.written[offset], sizeof written);
  memcpy(read, &shadow.read[offset], sizeof read);
  for (int i = 0; i < BYTES; i++) {
    race |= foreign(written[i], tag);
    undefined |= (written[i] == 0) | (written[i] & SHADOW_UNDEFINED);
    read[i] = (Entry)(foreign(read[i], tag) ? tag | SHADOW_SEVERAL : tag);
  }
  memcpy(&shadow.read[offset], read, sizeof read);
  if (race) report_race(w, I, lane, offset, BYTES, false);
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
  return undefined;
}

template <int BYTES>
inline void shadow_write(Wave& w, const Ins& I, int lane, u32 offset, bool undefined, const StoredData& data) {
  LdsShadow& shadow = *w.group->shadow;
  u32 tag = shadow_tag(w), entry = tag | (undefined ? SHADOW_UNDEFINED : 0);
  u32 rewritten = 0, was_read = 0;
  Entry written[BYTES], read[BYTES];
  memcpy(written, &shadow.written[offset], sizeof written);
  memcpy(read, &shadow.read[offset], sizeof read);
  for (int i = 0; i < BYTES; i++) rewritten |= foreign(written[i], tag), was_read |= foreign(read[i], tag);
  if (rewritten | was_read) {
    bool harmless = !was_read && stores_what_is_there(w, data, lane, offset, BYTES);
    if (harmless) entry |= SHADOW_SEVERAL;
    else report_race(w, I, lane, offset, BYTES, true);
  }
  for (int i = 0; i < BYTES; i++) written[i] = (Entry)entry;
  memcpy(&shadow.written[offset], written, sizeof written);
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
}

}  // namespace cdnasim
