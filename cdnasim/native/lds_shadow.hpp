// What is known of each LDS byte: who wrote and read it last, between which barriers, and whether
// it holds a defined value. Two waves that touch a byte between the same two barriers, one of them
// writing, race.
#pragma once
#include "checks.hpp"

namespace cdnasim {

struct LdsShadow {
  // epoch << 8 | undefined << 7 | wave; zero: never written. Epochs start at 1.
  std::vector<u32> written, read;
  // Direct-to-LDS loads still in flight, per dword: sequence number and wave + 1.
  std::vector<u32> dma_sequence;
  std::vector<u8> dma_wave;
  bool any_dma = false;

  explicit LdsShadow(size_t bytes)
      : written(bytes + 16), read(bytes + 16), dma_sequence(bytes / 4 + 4), dma_wave(bytes / 4 + 4) {}
  void reset() {
    std::fill(written.begin(), written.end(), 0);
    std::fill(read.begin(), read.end(), 0);
    if (any_dma) std::fill(dma_wave.begin(), dma_wave.end(), 0);
    any_dma = false;
  }
};
constexpr u32 SHADOW_WAVE = 31, SHADOW_SEVERAL = 31, SHADOW_UNDEFINED = 128;

inline u32 shadow_tag(const Wave& w) { return w.epoch << 8 | w.index; }
// True when `entry` was made between the same barriers by another wave.
inline bool foreign(u32 entry, u32 tag) {
  return (entry >> 8) == (tag >> 8) && (entry & SHADOW_WAVE) != (tag & SHADOW_WAVE);
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

// Note a read; returns whether any byte is undefined.
template <int BYTES>
inline bool shadow_read(Wave& w, const Ins& I, int lane, u32 offset) {
  LdsShadow& shadow = *w.group->shadow;
  u32 *written = &shadow.written[offset], *read = &shadow.read[offset], tag = shadow_tag(w);
  u32 race = 0, undefined = 0;
  for (int i = 0; i < BYTES; i++) {
    u32 x = written[i];
    race |= foreign(x, tag);
    undefined |= (x == 0) | (x & SHADOW_UNDEFINED);
  }
  if (race) report_race(w, I, lane, offset, BYTES, false);
  for (int i = 0; i < BYTES; i++) read[i] = foreign(read[i], tag) ? tag | SHADOW_SEVERAL : tag;
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
  return undefined;
}

template <int BYTES>
inline void shadow_write(Wave& w, const Ins& I, int lane, u32 offset, bool undefined, const StoredData& data) {
  LdsShadow& shadow = *w.group->shadow;
  u32 *written = &shadow.written[offset], *read = &shadow.read[offset], tag = shadow_tag(w);
  u32 rewritten = 0, was_read = 0, entry = tag | (undefined ? SHADOW_UNDEFINED : 0);
  for (int i = 0; i < BYTES; i++) rewritten |= foreign(written[i], tag), was_read |= foreign(read[i], tag);
  if (rewritten | was_read) {
    bool harmless = !was_read && stores_what_is_there(w, data, lane, offset, BYTES);
    if (harmless) entry |= SHADOW_SEVERAL;
    else report_race(w, I, lane, offset, BYTES, true);
  }
  for (int i = 0; i < BYTES; i++) written[i] = entry;
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
}

}  // namespace cdnasim
