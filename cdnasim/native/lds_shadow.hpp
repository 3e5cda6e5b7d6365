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
      : written(bytes + 16),
        read(bytes + 16),
        dma_sequence(bytes / 4 + 4),
        dma_wave(bytes / 4 + 4) {}
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
inline bool foreign(u32 entry, u32 tag) {
  u32 difference = (entry ^ tag) & ~SHADOW_UNDEFINED;
  return difference - 1 < SHADOW_WAVE;
}
// The same for the entries of N bytes at once.
template <int N>
struct Entries {
  typedef Entry Vec __attribute__((vector_size(2 * N)));
  typedef i16 Mask __attribute__((vector_size(2 * N)));
  Vec at;
  explicit Entries(const Entry* from) { memcpy(&at, from, sizeof at); }
  Mask foreign(u32 tag) const {
    return (Mask)((((at ^ (Entry)tag) & (Entry)~SHADOW_UNDEFINED) - (Entry)1) < (Entry)SHADOW_WAVE);
  }
  Mask undefined() const { return (Mask)(at == (Entry)0) | (Mask)(at & (Entry)SHADOW_UNDEFINED); }
  static bool any(Mask mask) {
    u64 words[2 * N > 8 ? N / 4 : 1] = {}, all = 0;
    memcpy(words, &mask, sizeof mask);
    for (u64 word : words) all |= word;
    return all != 0;
  }
};

void report_race(Wave& w, const Ins& I, int lane, u32 offset, int bytes, bool writing);
void check_dma(Wave& w, const Ins& I, int lane, u32 offset, int bytes);

// What a lane is about to store, from byte `skip` of it on; null for direct-to-LDS loads.
struct StoredData {
  const Arg* from;
  const Shape* shape;
  int skip;
};
// Several waves may store the same value to the same place: replicated layouts do.
bool stores_what_is_there(Wave& w, const StoredData& data, int lane, u32 offset, int bytes);

// Note a read of a power of two bytes; returns whether any of them is undefined.
template <int BYTES>
inline bool shadow_read(Wave& w, const Ins& I, int lane, u32 offset) {
  LdsShadow& shadow = *w.group->shadow;
  u32 tag = shadow_tag(w);
  Entries<BYTES> written(&shadow.written[offset]), read(&shadow.read[offset]);
  auto shared = read.foreign(tag) & (i16)SHADOW_SEVERAL;
  read.at = (typename Entries<BYTES>::Vec)shared | (Entry)tag;
  memcpy(&shadow.read[offset], &read.at, sizeof read.at);
  if (Entries<BYTES>::any(written.foreign(tag))) report_race(w, I, lane, offset, BYTES, false);
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
  return Entries<BYTES>::any(written.undefined());
}

template <int BYTES>
inline void shadow_write(Wave& w, const Ins& I, int lane, u32 offset, bool undefined,
                         const StoredData& data) {
  LdsShadow& shadow = *w.group->shadow;
  u32 tag = shadow_tag(w), entry = tag | (undefined ? SHADOW_UNDEFINED : 0);
  Entries<BYTES> written(&shadow.written[offset]), read(&shadow.read[offset]);
  auto rewritten = written.foreign(tag), was_read = read.foreign(tag);
  if (Entries<BYTES>::any(rewritten | was_read)) {
    bool unread = !Entries<BYTES>::any(was_read);
    if (unread && stores_what_is_there(w, data, lane, offset, BYTES)) entry |= SHADOW_SEVERAL;
    else report_race(w, I, lane, offset, BYTES, true);
  }
  written.at = (written.at ^ written.at) | (Entry)entry;
  memcpy(&shadow.written[offset], &written.at, sizeof written.at);
  if (shadow.any_dma) check_dma(w, I, lane, offset, BYTES);
}

}  // namespace cdnasim
