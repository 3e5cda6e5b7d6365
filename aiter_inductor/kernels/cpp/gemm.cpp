// out [M, N] = sum over K blocks of (x block . weight block) * x_scale * weight_scale, + bias.
//
// Weights are one byte an element and are decoded through a table of 256 values, four rows at a
// time, into a buffer that stays in cache while all rows of a panel of x pass over it: each weight
// byte is read from memory once for each panel of x.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_M = 3, TILE_N = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_M = 1, TILE_N = 4;
#else
constexpr int VECTOR_BYTES = 16, TILE_M = 1, TILE_N = 4;
#endif

// libgomp's entry point. Left undefined so that the loader binds the OpenMP library that torch has
// loaded already: a second one would bring a second pool of spinning threads.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

struct Gemm {
    const void *x;              // [M, K], rows x_stride apart
    const uint8_t *weight;      // [N, K], rows weight_stride apart
    const float *x_scale;       // [M, K / x_group], rows x_scale_stride apart; null: 1
    const float *weight_scale;  // [N / block_n, K / block_k], rows weight_scale_stride apart
    const float *bias;          // [N], or null
    const float *table;         // [256]: the value of each weight byte
    float *out;                 // [M, N]
    int64_t M, N, K;
    int64_t x_stride, weight_stride, x_scale_stride, weight_scale_stride;
    int64_t x_group, block_n, block_k;
    int64_t step;               // elements of K that share both scales
    int64_t threads;
};

namespace {

constexpr int64_t UNIT = 64;
constexpr int64_t FEW_ELEMENTS = 1 << 19;    // 0.1 ms to pack
constexpr int64_t PANEL_ELEMENTS = 1 << 18;  // half a megabyte of bf16: a panel of x stays in L2

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int LANES = VECTOR_BYTES / sizeof(float);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Fp32 {
    typedef float Element;
    typedef Vector Word;
    static constexpr int STEP = LANES;
    const float *table;

    explicit Fp32(const float *values) : table(values) {}

    void decode(const uint8_t *from, int64_t count, float *to) const {
        for (int64_t i = 0; i < count; i += STEP, to += TILE_N * STEP)
            for (int64_t j = 0; j < least(count - i, STEP); ++j) to[j] = table[from[i + j]];
    }
    static void pack(const float *from, int64_t count, float *to) {
        memcpy(to, from, count * sizeof(float));
    }
    static inline Word load(const float *from) {
        Word word;
        memcpy(&word, from, sizeof word);
        return word;
    }
    static inline Vector mac(Vector sum, Word w, Word x) { return sum + w * x; }
};

#if HAS_BF16
// Exact for weights of up to eight significant bits, which fp8 and int8 have. Elements of 64 lie as
// unpacking leaves them, every other 8 first; x is packed in the same order.
struct Bf16 {
    typedef uint16_t Element;
    typedef __m512i Word;
    static constexpr int STEP = 32;
    alignas(64) uint8_t low[256], high[256];

    explicit Bf16(const float *values) {
        for (int i = 0; i < 256; ++i) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            low[i] = uint8_t(bits >> 16);
            high[i] = uint8_t(bits >> 24);
        }
    }

    static inline __m512i look_up(const uint8_t *table, __m512i index, __mmask64 upper) {
        const __m512i *t = reinterpret_cast<const __m512i *>(table);
        __m512i below = _mm512_permutex2var_epi8(t[0], index, t[1]);
        return _mm512_mask_mov_epi8(below, upper, _mm512_permutex2var_epi8(t[2], index, t[3]));
    }
    void decode(const uint8_t *from, int64_t count, uint16_t *to) const {
        for (int64_t i = 0; i < count; i += UNIT, to += TILE_N * UNIT) {
            int64_t here = least(count - i, UNIT);
            __mmask64 live = here == UNIT ? ~0ull : (1ull << here) - 1;
            __m512i bytes = _mm512_maskz_loadu_epi8(live, from + i);
            __mmask64 upper = _mm512_movepi8_mask(bytes);
            __m512i lows = _mm512_maskz_mov_epi8(live, look_up(low, bytes, upper));
            __m512i highs = _mm512_maskz_mov_epi8(live, look_up(high, bytes, upper));
            _mm512_storeu_si512(to, _mm512_unpacklo_epi8(lows, highs));
            _mm512_storeu_si512(to + TILE_N * STEP, _mm512_unpackhi_epi8(lows, highs));
        }
    }
    static void pack(const uint16_t *from, int64_t count, uint16_t *to) {
        for (int64_t i = 0; i < count; i += UNIT) {
            alignas(64) uint16_t whole[UNIT] = {};
            memcpy(whole, from + i, least(count - i, UNIT) * sizeof(uint16_t));
            __m512i a = _mm512_load_si512(whole), b = _mm512_load_si512(whole + 32);
            _mm512_storeu_si512(to + i, _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88));
            _mm512_storeu_si512(to + i + 32, _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd));
        }
    }
    static inline Word load(const uint16_t *from) { return _mm512_loadu_si512(from); }
    static inline Vector mac(Vector sum, Word w, Word x) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
};
#endif

inline float total_of(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// Scales of one tile of weight rows: [rows, blocks, panel], one row where all share theirs.
struct Scales {
    const float *values;
    int64_t row_stride, panel, blocks;
};

// Sums of ROWS rows of x, `length` apart, with TILE_N rows of weights, which lie STEP elements of
// each in turn. `scales` begins at the first of the rows.
template <class T, int ROWS>
void multiply(const typename T::Element *x, const typename T::Element *w, int64_t length,
              int64_t padded, Scales scales, float (*sums)[TILE_N]) {
    Vector total[ROWS][TILE_N] = {};
    for (int64_t block = 0; block < scales.blocks; ++block) {
        Vector part[ROWS][TILE_N] = {};
        for (int64_t k = 0; k < padded; k += T::STEP, x += T::STEP, w += TILE_N * T::STEP) {
            typename T::Word word[ROWS];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) word[i] = T::load(x + i * length);
#pragma GCC unroll 4
            for (int n = 0; n < TILE_N; ++n) {
                typename T::Word of_w = T::load(w + n * T::STEP);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i) part[i][n] = T::mac(part[i][n], of_w, word[i]);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < TILE_N; ++n) {
            const float *scale = scales.values + n * scales.row_stride + block * scales.panel;
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) total[i][n] += part[i][n] * scale[i];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int n = 0; n < TILE_N; ++n) sums[i][n] = total_of(total[i][n]);
}

template <class T>
struct Work {
    typedef typename T::Element Element;
    const Gemm &g;
    const T codec;
    const int64_t blocks, padded, length, panel, tiles_n, num_panels;
    std::unique_ptr<Element[]> packed;   // [M, length]
    std::unique_ptr<float[]> x_scales;   // [groups of K, M]
    std::atomic<int64_t> next{0}, packed_rows{0};
    std::atomic<bool> out_of_memory{false};

    explicit Work(const Gemm &gemm)
        : g(gemm), codec(gemm.table), blocks(divide_up(g.K, g.step)),
          padded(divide_up(g.step, UNIT) * UNIT), length(blocks * padded),
          panel(most(TILE_M * 4, least(TILE_M * 32, PANEL_ELEMENTS / length))),
          tiles_n(divide_up(g.N, TILE_N)), num_panels(divide_up(g.M, panel)),
          packed(new (std::nothrow) Element[g.M * length]()),
          x_scales(new (std::nothrow) float[divide_up(g.K, g.x_group) * g.M]) {}

    void pack_rows() {
        const Element *x = static_cast<const Element *>(g.x);
        for (int64_t m; (m = packed_rows++) < g.M;) {
            for (int64_t group = 0; group < divide_up(g.K, g.x_group); ++group)
                x_scales[group * g.M + m] =
                    g.x_scale ? g.x_scale[m * g.x_scale_stride + group] : 1.0f;
            for (int64_t block = 0; block < blocks; ++block) {
                int64_t k = block * g.step;
                T::pack(x + m * g.x_stride + k, least(g.step, g.K - k),
                        packed.get() + m * length + block * padded);
            }
        }
    }

    Scales scales_of(int64_t n0, int64_t m0, int64_t rows, float *buffer) const {
        int64_t last = least(n0 + TILE_N, g.N) - 1;
        bool shared = n0 / g.block_n == last / g.block_n;
        int64_t row_stride = shared ? 0 : panel * blocks;
        for (int n = 0; n < (shared ? 1 : TILE_N); ++n) {
            const float *of_weight =
                g.weight_scale + least(n0 + n, last) / g.block_n * g.weight_scale_stride;
            for (int64_t block = 0; block < blocks; ++block) {
                int64_t k = block * g.step;
                float *to = buffer + n * row_stride + block * panel;
                const float *of_x = x_scales.get() + (k / g.x_group) * g.M + m0;
                for (int64_t m = 0; m < rows; ++m) to[m] = of_x[m] * of_weight[k / g.block_k];
            }
        }
        return {buffer, row_stride, panel, blocks};
    }

    void decode_rows(int64_t n0, Element *to) const {
        for (int n = 0; n < TILE_N; ++n) {
            const uint8_t *row = g.weight + least(n0 + n, g.N - 1) * g.weight_stride;
            for (int64_t block = 0; block < blocks; ++block) {
                int64_t k = block * g.step;
                codec.decode(row + k, least(g.step, g.K - k), to + block * padded * TILE_N + n * T::STEP);
            }
        }
    }

    void store(const float (*sums)[TILE_N], int64_t m, int64_t n0, int rows) const {
        for (int i = 0; i < rows; ++i)
            for (int64_t n = n0; n < least(n0 + TILE_N, g.N); ++n)
                g.out[(m + i) * g.N + n] = sums[i][n - n0] + (g.bias ? g.bias[n] : 0.0f);
    }

    void tile(int64_t n0, int64_t m0, Element *decoded, float *scale_buffer) const {
        int64_t rows = least(panel, g.M - m0);
        decode_rows(n0, decoded);
        Scales scales = scales_of(n0, m0, rows, scale_buffer);
        float sums[TILE_M][TILE_N];
        int64_t m = 0;
        for (; m + TILE_M <= rows; m += TILE_M) {
            const Element *x = packed.get() + (m0 + m) * length;
            multiply<T, TILE_M>(x, decoded, length, padded, scales, sums);
            store(sums, m0 + m, n0, TILE_M);
            scales.values += TILE_M;
        }
        for (; m < rows; ++m) {
            const Element *x = packed.get() + (m0 + m) * length;
            multiply<T, 1>(x, decoded, length, padded, scales, sums);
            store(sums, m0 + m, n0, 1);
            ++scales.values;
        }
    }

    void multiply_tiles() {
        std::unique_ptr<Element[]> decoded(new (std::nothrow) Element[TILE_N * length]());
        std::unique_ptr<float[]> scales(new (std::nothrow) float[TILE_N * panel * blocks]);
        if (!decoded || !scales) {
            out_of_memory = true;
            return;
        }
        for (int64_t task; (task = next++) < num_panels * tiles_n;)
            tile(task % tiles_n * TILE_N, task / tiles_n * panel, decoded.get(), scales.get());
    }
};

template <class T>
void in_parallel(Work<T> &work, void (*part)(void *)) {
    if (GOMP_parallel && work.g.threads > 1)
        GOMP_parallel(part, &work, unsigned(work.g.threads), 0);
    else
        part(&work);
}

template <class T>
int run(const Gemm &g) {
    Work<T> work(g);
    if (!work.packed || !work.x_scales) return 1;
    // Each region ends in a wait for every thread, which few rows are not worth.
    if (g.M * work.length <= FEW_ELEMENTS)
        work.pack_rows();
    else
        in_parallel<T>(work, [](void *w) { static_cast<Work<T> *>(w)->pack_rows(); });
    in_parallel<T>(work, [](void *w) { static_cast<Work<T> *>(w)->multiply_tiles(); });
    return work.out_of_memory;
}

}  // namespace

// M, N and K are positive. Returns 1 if there is not enough memory, else 0.
extern "C" __attribute__((visibility("default"))) int gemm_fp32(const Gemm *g) {
    return run<Fp32>(*g);
}

// As gemm_fp32, with x in bf16; -1 on a CPU without the instructions.
extern "C" __attribute__((visibility("default"))) int gemm_bf16(const Gemm *g) {
#if HAS_BF16
    return run<Bf16>(*g);
#else
    (void)g;
    return -1;
#endif
}
