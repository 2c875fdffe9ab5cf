// 64 codes at a time; a mask register holds just their bits of one plane.

#include <immintrin.h>

#include "planes.hpp"

namespace plyweight::avx512 {

std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 int num_planes, std::uint8_t& seen) {
    const __m128i to_top = _mm_cvtsi32_si128(8 - num_planes);
    __m512i all = _mm512_setzero_si512();
    std::size_t done = 0;
    for (; done + 64 <= num_codes; done += 64) {
        __m512i bits = _mm512_loadu_si512(codes + done);
        all = _mm512_or_si512(all, bits);
        // Bits that cross into the next byte lie below its own top `num_planes`.
        bits = _mm512_sll_epi16(bits, to_top);
        for (int row = 0; row < num_planes; ++row) {
            const __mmask64 mask = _mm512_movepi8_mask(bits);  // the highest bit of every byte
            __builtin_memcpy(planes[row] + done / 8, &mask, 8);
            bits = _mm512_add_epi8(bits, bits);
        }
    }
    alignas(64) std::uint8_t bytes[64];
    _mm512_store_si512(bytes, all);
    for (const std::uint8_t byte : bytes) seen = static_cast<std::uint8_t>(seen | byte);
    return done;
}

std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,
                   std::size_t num_codes) {
    const __m512i one = _mm512_set1_epi8(1);
    std::size_t done = 0;
    for (; done + 64 <= num_codes; done += 64) {
        __m512i found = _mm512_setzero_si512();
        for (int row = 0; row < num_planes; ++row) {
            __mmask64 mask;
            __builtin_memcpy(&mask, planes[row] + done / 8, 8);
            found = _mm512_add_epi8(found, found);
            found = _mm512_mask_add_epi8(found, mask, found, one);
        }
        _mm512_storeu_si512(codes + done, found);
    }
    return done;
}

}  // namespace plyweight::avx512
