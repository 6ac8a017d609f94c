// Where a step of sampling in bfloat16 spends its time, for a few rows x; sums are float32. See amx.py.
//
// y = x W^T + b of x (rows, in) and a large W (out, in), on AMX tiles. Such a product is as fast as W arrives from
// memory. The tiles read W as it lies there, 16 rows by 32 columns at a time, and ask for what they will need 48 KiB
// later; x, which is small, is what gets rearranged.
//
// The root mean square norm of x, which in PyTorch is nine operations.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bfloat16 = uint16_t;
using Pair = uint32_t;  // two bfloat16 along "in", which a tile multiplies and adds in one

constexpr int SIDE = 16;         // rows of a tile, and its columns of 4 bytes
constexpr int DEPTH = 2 * SIDE;  // columns of a tile in bfloat16
constexpr int AHEAD = 48 << 10;  // bytes

__m512 load(const bfloat16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

void store(bfloat16* to, __m512 values) {
    const __m256bh rounded = _mm512_cvtneps_pbh(values);
    std::memcpy(to, &rounded, sizeof rounded);
}

// Tile 0 is of W, 1 and 2 of x, one for each group of 16 rows; 3 and 4 are their sums.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64};
    uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE};
};
const TileConfig CONFIG;  // not a local variable: the compiler takes an instruction that reads it to read 8 bytes of it

// x as tiles: pairs[group of 16 rows][pair of columns][row in group]. The threads of a team share the work.
void pair_up(const bfloat16* x, Pair* pairs, int64_t rows, int64_t in) {
#pragma omp for
    for (int64_t start = 0; start < in; start += DEPTH)
        for (int64_t row = 0; row < rows; ++row) {
            Pair* to = pairs + row / SIDE * SIDE * (in / 2) + row % SIDE;
            for (int64_t column = start; column < start + DEPTH; column += 2)
                std::memcpy(to + column / 2 * SIDE, x + row * in + column, sizeof(Pair));
        }
}

// The outputs [first, last) of up to 16 rows, or of up to 32.
template <bool TWO_GROUPS>
void multiply(const Pair* pairs, const bfloat16* weight, const bfloat16* bias, bfloat16* y, int64_t rows, int64_t in,
              int64_t out, int64_t first, int64_t last) {
    alignas(64) float sums[2][SIDE][SIDE];  // group, output, row in group
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i outputs = _mm512_slli_epi32(lanes, 4);  // of one row
    for (int64_t n = first; n < last; n += SIDE) {
        const bfloat16* w = weight + n * in;
        const char* later = reinterpret_cast<const char*>(w) + AHEAD;
        _tile_zero(3);
        _tile_zero(4);
        for (int64_t k = 0; k < in; k += DEPTH, later += SIDE * 64) {
            _tile_loadd(0, w + k, in * sizeof(bfloat16));
            for (int line = 0; line < SIDE; ++line) _mm_prefetch(later + line * 64, _MM_HINT_T1);
            _tile_loadd(1, pairs + k / 2 * SIDE, 64);
            _tile_dpbf16ps(3, 0, 1);
            if (TWO_GROUPS) {
                _tile_loadd(2, pairs + (in + k) / 2 * SIDE, 64);
                _tile_dpbf16ps(4, 0, 2);
            }
        }
        _tile_stored(3, sums[0], 64);
        if (TWO_GROUPS) _tile_stored(4, sums[1], 64);
        const __m512 offset = bias ? load(bias + n) : _mm512_setzero_ps();
        for (int64_t row = 0; row < rows; ++row) {
            const float* sum_of_row = &sums[row / SIDE][0][row % SIDE];
            store(y + row * out + n, _mm512_add_ps(_mm512_i32gather_ps(outputs, sum_of_row, 4), offset));
        }
    }
}

}  // namespace

extern "C" {

// Ask the system for the tiles' registers; 0 if it grants them.
int vistok_amx_start() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return static_cast<int>(syscall(SYS_arch_prctl, REQUEST, TILE_DATA));
}

// rows <= 32, in a multiple of 32, out one of 16; bias may be null. Threads are the caller's choice: OpenMP's own number
// of them is another one in each thread that calls, and in each of several OpenMP libraries.
void vistok_amx_linear(const bfloat16* x, const bfloat16* weight, const bfloat16* bias, bfloat16* y, int64_t rows,
                       int64_t in, int64_t out, int64_t most_threads) {
    const int64_t groups = (rows + SIDE - 1) / SIDE, blocks = out / SIDE;
    thread_local std::vector<Pair> kept;
    if (kept.size() < static_cast<size_t>(groups * SIDE * (in / 2))) kept.resize(groups * SIDE * (in / 2));
    Pair* pairs = kept.data();
#pragma omp parallel num_threads(static_cast<int>(most_threads))
    {
        pair_up(x, pairs, rows, in);
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = blocks * thread / threads * SIDE, last = blocks * (thread + 1) / threads * SIDE;
        _tile_loadconfig(&CONFIG);
        const auto work = groups == 1 ? multiply<false> : multiply<true>;
        work(pairs, weight, bias, y, rows, in, out, first, last);
        _tile_release();
    }
}

// y = x / rms(x) * weight of x (rows, width); width a multiple of 16. Rounded before the weight comes, too.
void vistok_rms_norm(const bfloat16* x, const bfloat16* weight, bfloat16* y, int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += SIDE) {
            const __m512 values = load(x + i);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int64_t i = 0; i < width; i += SIDE) {
            store(y + i, _mm512_mul_ps(load(x + i), scale));
            store(y + i, _mm512_mul_ps(load(y + i), load(weight + i)));
        }
    }
}

}  // extern "C"
