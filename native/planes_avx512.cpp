// 512 codes at a time, which are a cache line of every plane.
//
// Eight registers hold the codes; byte c of quadword q of register r is code 64 r + 8 q + c. In the
// planes the eight codes of a quadword are one byte, so the work is a transposition in three steps,
// each with the instruction that is made for it:
//
//     bits of a quadword       gf2p8affineqb    code c, bit k  ->  byte k, bit c
//     bytes of a register      vpermb           quadword q, byte k  ->  quadword k, byte q
//     quadwords of registers   24 shuffles      register r, quadword k  ->  register k, quadword r
//
// It takes as long for one plane as for eight, but memory is slower than that for any number.

#include <immintrin.h>

#include "planes.hpp"

namespace plyweight::avx512 {
namespace {

// Byte i of the result is the quadword that selects bit i (an identity, rows from the last).
const long long kSelectBits = static_cast<long long>(0x8040201008040201ULL);

// Quadword j of register i becomes quadword i of register j.
inline void transpose_quadwords(__m512i (&x)[8]) {
    __m512i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 8; half += 4) {
            b[half + i] = _mm512_shuffle_i64x2(a[half + i], a[half + i + 2], 0x88);
            b[half + i + 2] = _mm512_shuffle_i64x2(a[half + i], a[half + i + 2], 0xdd);
        }
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_shuffle_i64x2(b[i], b[i + 4], 0x88);
        x[i + 4] = _mm512_shuffle_i64x2(b[i], b[i + 4], 0xdd);
    }
}

// For vpermb: byte 8 i + j takes byte 8 j + i, or, `reversed`, byte 8 (7 - j) + i.
inline __m512i transposed_bytes(bool reversed) {
    alignas(64) std::uint8_t from[64];
    for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 8; ++j) {
            from[8 * i + j] = static_cast<std::uint8_t>(8 * (reversed ? 7 - j : j) + i);
        }
    }
    return _mm512_load_si512(from);
}

}  // namespace

std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 int num_planes, std::uint8_t& seen) {
    const __m512i select = _mm512_set1_epi64(kSelectBits);
    const __m512i turn = transposed_bytes(false);
    std::uint8_t* rows[kMaxPlanes];
    for (int row = 0; row < num_planes; ++row) rows[row] = planes[row];
    __m512i all = _mm512_setzero_si512();
    std::size_t done = 0;
    for (; done + 512 <= num_codes; done += 512) {
        __m512i x[8];
        for (int i = 0; i < 8; ++i) {
            // The work on a block hides the next one from the processor's own prefetching: twice as
            // fast out of cache, and nothing lost in it.
            _mm_prefetch(reinterpret_cast<const char*>(codes + done + 64 * i + 4096), _MM_HINT_T0);
            x[i] = _mm512_loadu_si512(codes + done + 64 * i);
            all = _mm512_or_si512(all, x[i]);
            // Bit c of byte k is now bit k of code 7 - c; a second one turns the bits around.
            x[i] = _mm512_gf2p8affine_epi64_epi8(select, x[i], 0);
            x[i] = _mm512_gf2p8affine_epi64_epi8(x[i], select, 0);
            x[i] = _mm512_permutexvar_epi8(turn, x[i]);
        }
        transpose_quadwords(x);
        for (int row = 0; row < num_planes; ++row) {
            _mm512_storeu_si512(rows[row] + done / 8, x[num_planes - 1 - row]);
        }
    }
    alignas(64) std::uint8_t bytes[64];
    _mm512_store_si512(bytes, all);
    for (const std::uint8_t byte : bytes) seen = static_cast<std::uint8_t>(seen | byte);
    return done;
}

std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,
                   std::size_t num_codes) {
    const __m512i select = _mm512_set1_epi64(kSelectBits);
    const __m512i turn = transposed_bytes(true);  // what affineqb turns around is turned before
    const std::uint8_t* rows[kMaxPlanes];
    for (int row = 0; row < num_planes; ++row) rows[row] = planes[row];
    std::size_t done = 0;
    for (; done + 512 <= num_codes; done += 512) {
        __m512i x[8];
        for (int bit = 0; bit < 8; ++bit) {
            x[bit] = bit < num_planes ? _mm512_loadu_si512(rows[num_planes - 1 - bit] + done / 8)
                                      : _mm512_setzero_si512();
        }
        transpose_quadwords(x);
        for (int i = 0; i < 8; ++i) {
            x[i] = _mm512_permutexvar_epi8(turn, x[i]);
            x[i] = _mm512_gf2p8affine_epi64_epi8(select, x[i], 0);
            _mm512_storeu_si512(codes + done + 64 * i, x[i]);
        }
    }
    return done;
}

}  // namespace plyweight::avx512
