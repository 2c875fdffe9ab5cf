// 32 codes at a time.

#include <immintrin.h>

#include "planes.hpp"

namespace plyweight::avx2 {

std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 int num_planes, std::uint8_t& seen) {
    const __m128i to_top = _mm_cvtsi32_si128(8 - num_planes);
    __m256i all = _mm256_setzero_si256();
    std::size_t done = 0;
    for (; done + 32 <= num_codes; done += 32) {
        __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + done));
        all = _mm256_or_si256(all, bits);
        // Bits that cross into the next byte lie below its own top `num_planes`.
        bits = _mm256_sll_epi16(bits, to_top);
        for (int row = 0; row < num_planes; ++row) {
            const int mask = _mm256_movemask_epi8(bits);  // the highest bit of every byte
            __builtin_memcpy(planes[row] + done / 8, &mask, 4);
            bits = _mm256_add_epi8(bits, bits);
        }
    }
    alignas(32) std::uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), all);
    for (const std::uint8_t byte : bytes) seen = static_cast<std::uint8_t>(seen | byte);
    return done;
}

std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,
                   std::size_t num_codes) {
    // Eight copies of each of the four bytes, of which each keeps one bit.
    const __m256i copies = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i places = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    std::size_t done = 0;
    for (; done + 32 <= num_codes; done += 32) {
        __m256i found = _mm256_setzero_si256();
        for (int row = 0; row < num_planes; ++row) {
            int word;
            __builtin_memcpy(&word, planes[row] + done / 8, 4);
            __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(word), copies);
            bits = _mm256_cmpeq_epi8(_mm256_and_si256(bits, places), places);
            found = _mm256_sub_epi8(_mm256_add_epi8(found, found), bits);  // a one is -1 here
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + done), found);
    }
    return done;
}

}  // namespace plyweight::avx2
