// 32 codes at a time, in blocks of 512, which are a cache line of every plane.

#include <immintrin.h>

#include "planes.hpp"

namespace plyweight::avx2 {
namespace {

constexpr std::size_t kBlock = 512;

// Out of cache, eight streams are more than the processor fetches by itself in time: asking for a
// page ahead makes 8 planes from codes 3 times as fast, and codes from 8 planes twice.
constexpr std::size_t kAhead = 4096;

inline void prefetch(const void* bytes) {
    _mm_prefetch(static_cast<const char*>(bytes), _MM_HINT_T0);
}

// With the number of planes known to the compiler, the loops over them are gone.
template <int num_planes>
std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 std::uint8_t& seen) {
    __m256i all = _mm256_setzero_si256();
    std::size_t done = 0;
    for (; done + kBlock <= num_codes; done += kBlock) {
        // Eight streams of four bytes each would share too few sets of the first cache.
        alignas(64) int lines[num_planes][kBlock / 32];
        for (std::size_t i = 0; i < kBlock; i += 64) prefetch(codes + done + kAhead + i);
        for (std::size_t i = 0; i < kBlock / 32; ++i) {
            __m256i bits = _mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(codes + done + 32 * i));
            all = _mm256_or_si256(all, bits);
            // Bits that cross into the next byte lie below its own top `num_planes`.
            bits = _mm256_slli_epi16(bits, 8 - num_planes);
            for (int row = 0; row < num_planes; ++row) {
                lines[row][i] = _mm256_movemask_epi8(bits);  // the highest bit of every byte
                bits = _mm256_add_epi8(bits, bits);
            }
        }
        for (int row = 0; row < num_planes; ++row) {
            prefetch(planes[row] + (done + kAhead) / 8);
            __builtin_memcpy(planes[row] + done / 8, lines[row], kBlock / 8);
        }
    }
    alignas(32) std::uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), all);
    for (const std::uint8_t byte : bytes) seen = static_cast<std::uint8_t>(seen | byte);
    return done;
}

template <int num_planes>
std::size_t unpack(const std::uint8_t* const* planes, std::uint8_t* codes, std::size_t num_codes) {
    // Eight copies of each of the four bytes, of which each keeps one bit.
    const __m256i copies = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i places = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    std::size_t done = 0;
    for (; done + kBlock <= num_codes; done += kBlock) {
        alignas(64) int lines[num_planes][kBlock / 32];
        for (int row = 0; row < num_planes; ++row) {
            prefetch(planes[row] + (done + kAhead) / 8);
            __builtin_memcpy(lines[row], planes[row] + done / 8, kBlock / 8);
        }
        for (std::size_t i = 0; i < kBlock / 32; ++i) {
            __m256i found = _mm256_setzero_si256();
            for (int row = 0; row < num_planes; ++row) {
                __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(lines[row][i]), copies);
                bits = _mm256_cmpeq_epi8(_mm256_and_si256(bits, places), places);
                found = _mm256_sub_epi8(_mm256_add_epi8(found, found), bits);  // a one is -1 here
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + done + 32 * i), found);
        }
    }
    return done;
}

}  // namespace

std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 int num_planes, std::uint8_t& seen) {
    switch (num_planes) {
        case 1: return pack<1>(codes, num_codes, planes, seen);
        case 2: return pack<2>(codes, num_codes, planes, seen);
        case 3: return pack<3>(codes, num_codes, planes, seen);
        case 4: return pack<4>(codes, num_codes, planes, seen);
        case 5: return pack<5>(codes, num_codes, planes, seen);
        case 6: return pack<6>(codes, num_codes, planes, seen);
        case 7: return pack<7>(codes, num_codes, planes, seen);
        default: return pack<8>(codes, num_codes, planes, seen);
    }
}

std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,
                   std::size_t num_codes) {
    switch (num_planes) {
        case 1: return unpack<1>(planes, codes, num_codes);
        case 2: return unpack<2>(planes, codes, num_codes);
        case 3: return unpack<3>(planes, codes, num_codes);
        case 4: return unpack<4>(planes, codes, num_codes);
        case 5: return unpack<5>(planes, codes, num_codes);
        case 6: return unpack<6>(planes, codes, num_codes);
        case 7: return unpack<7>(planes, codes, num_codes);
        default: return unpack<8>(planes, codes, num_codes);
    }
}

}  // namespace plyweight::avx2
