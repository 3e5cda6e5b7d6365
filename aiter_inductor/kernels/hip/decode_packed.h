// Tiles of packs in shared memory. Tokens of a page that lie side by side are one piece of each pack
// of a key, and whole pages one piece of all: TMA copies them as they are, a lane a piece, and
// ldmatrix reads eight vectors side by side, which are eight tokens of a pack of keys, or eight
// elements of a pack of values. A wave takes only what it asked for, so that none waits for another.
#pragma once

constexpr int KEY_PACKS = D / PACK;
constexpr bool WHOLE_PAGES = PAGE == BESIDE;  // all packs of a head's keys in one piece
constexpr int KEY_PIECES = TILE / BESIDE * (WHOLE_PAGES ? 1 : KEY_PACKS);
constexpr u32 KEY_PIECE = BESIDE * (WHOLE_PAGES ? KEY_PACKS : 1) * 16, VALUE_PIECE = DV * 16;
constexpr int PACK_PITCH = VALUE_ROUNDS * 16;  // vectors of a pack of values
constexpr int KEY_BYTES = TILE * KEY_PACKS * 16, VALUES_BYTES = 4 * PACK_PITCH * 16;
constexpr int TILE_BYTES = KEY_BYTES + VALUES_BYTES + 16;  // a barrier behind each
static_assert(STAGES > 1, "one tile is used while the next is copied");

struct Tiles {
  u32 base;  // shared address of the wave's first
};

extern __shared__ char dynamic_shared[];
#define SIMT_TILES(tiles)                                            \
  const Tiles tiles{(u32)__cvta_generic_to_shared(dynamic_shared) +  \
                    thread_index() / WAVE * (STAGES * TILE_BYTES)}

SIMT_DEVICE u32 arrived(const Tiles& tiles, int stage) {
  return tiles.base + stage * TILE_BYTES + KEY_BYTES + VALUES_BYTES;
}

SIMT_DEVICE void begin_tiles(const Tiles& tiles) {
  if (lane() < STAGES)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived(tiles, lane())));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
}

SIMT_DEVICE void copy(u32 to, const char* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Pieces of keys, then the four packs of values, each by one lane.
SIMT_DEVICE void ask_tile(const Tiles& tiles, int stage, const Pages& pages,
                          const u32 (&keys)[DEALT], const u32 (&values)[DEALT]) {
  constexpr int PIECES = KEY_PIECES + 4, EACH = (PIECES + WAVE - 1) / WAVE;
  constexpr int BY_PACK = WHOLE_PAGES ? 1 : KEY_PACKS;
  const u32 start = tiles.base + stage * TILE_BYTES;
  const char* from[EACH];
  u32 bytes[EACH], all = 0;
  UNROLL for (int i = 0; i < EACH; i++) {
    const int piece = i * WAVE + lane(), pack = piece - KEY_PIECES;
    const bool is_key = pack < 0;
    const int place = is_key ? piece / BY_PACK * BESIDE : (pack < 4 ? pack : 0) * PACK;
    const u32 key = from_place(keys, place), value = from_place(values, place);
    const u32 offset = is_key ? key + piece % BY_PACK * PAGE : value;
    from[i] = (is_key ? pages.keys : pages.values) + (u64)offset * 16;
    bytes[i] = is_key ? KEY_PIECE : VALUE_PIECE;
    if ((is_key ? key : value) == NOWHERE || pack >= 4) bytes[i] = 0;
    all += bytes[i];
  }
  all = __reduce_add_sync(~0u, all);  // no lane reads the tile that was here any more
  const u32 barrier = arrived(tiles, stage);
  if (lane() == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(all)
                 : "memory");
  __syncwarp();
  UNROLL for (int i = 0; i < EACH; i++) {
    const int piece = i * WAVE + lane(), pack = piece - KEY_PIECES;
    const u32 to = pack < 0 ? piece * KEY_PIECE : KEY_BYTES + pack * PACK_PITCH * 16;
    if (bytes[i]) copy(start + to, from[i], bytes[i], barrier);
  }
}

SIMT_DEVICE void close_tile(const Tiles&) {}

SIMT_DEVICE void wait_for_tile(const Tiles& tiles, int stage, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(arrived(tiles, stage)), "r"(parity)
        : "memory");
}

// The word of this quarter in each of four matrices, of eight vectors side by side; lanes 8 m to
// 8 m + 7 name the vectors of matrix m.
SIMT_DEVICE Chunk<16> dealt(u32 from) {
  Chunk<16> chunk;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]),
                 "=r"(chunk.words[3])
               : "r"(from)
               : "memory");
  return chunk;
}

SIMT_DEVICE Chunk<16> key_chunk(const Tiles& tiles, int stage, int s, int h, int i) {
  const int row = lane() % 8 + 8 * h, token = place_in_tile(s, quarter_of(row), place_of(row));
  const int asked = 4 * i + lane() / 8, pack = asked < KEY_PACKS ? asked : KEY_PACKS - 1;
  const int vector = (token / BESIDE * KEY_PACKS + pack) * BESIDE + token % BESIDE;
  Chunk<16> chunk = dealt(tiles.base + stage * TILE_BYTES + vector * 16);
  UNROLL for (int word = 0; word < 4; word++)
    if (4 * i + word >= KEY_PACKS) chunk.words[word] = 0;
  return chunk;
}
SIMT_DEVICE Chunk<16> value_chunk(const Tiles& tiles, int stage, int, int i, int n) {
  const int vector = lane() / 8 * PACK_PITCH + 16 * i + 8 * n + lane() % 8;
  return dealt(tiles.base + stage * TILE_BYTES + KEY_BYTES + vector * 16);
}
