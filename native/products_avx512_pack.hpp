// Rounding of activations to 8 bits, eight rows side by side, in AVX-512.
// Part of products_avx512.cpp, and compiled with it alone.
#pragma once

#include <immintrin.h>

#include "products_tiles.hpp"

namespace plyweight::avx512 {
namespace {

// The first `count` lanes, of up to 16.
inline __mmask16 lanes(std::size_t count) {
    return static_cast<__mmask16>((1u << smaller(count, 16)) - 1);
}

// The largest lane of each of eight registers of integers: halves of the lanes are compared while
// registers are merged.
inline __m256i largest_lanes(const __m512i* of) {
    __m512i twos[4], fours[2];
    PLYWEIGHT_UNROLL
    for (int i = 0; i < 4; ++i) {
        twos[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(of[2 * i], of[2 * i + 1]),
                                   _mm512_unpackhi_epi32(of[2 * i], of[2 * i + 1]));
    }
    PLYWEIGHT_UNROLL
    for (int i = 0; i < 2; ++i) {
        fours[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(twos[2 * i], twos[2 * i + 1]),
                                    _mm512_unpackhi_epi64(twos[2 * i], twos[2 * i + 1]));
    }
    // A quarter of a register has four rows by now.
    const __m512i eights = _mm512_max_epi32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x88),
                                            _mm512_shuffle_i32x4(fours[0], fours[1], 0xdd));
    const __m512i all = _mm512_max_epi32(eights, _mm512_shuffle_i32x4(eights, eights, 0xb1));
    return _mm512_castsi512_si256(_mm512_shuffle_i32x4(all, all, 0x08));
}

// Codes of the first `count` of 64 inputs, then zeros.
inline __m512i codes_of(const float* x, std::size_t count, float scale) {
    const __m512 divisor = _mm512_set1_ps(scale), most = _mm512_set1_ps(127.0f);
    const auto sixteen = [&](std::size_t begin) {
        if (begin >= count) return _mm_setzero_si128();
        __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes(count - begin), x + begin), divisor);
        v = _mm512_max_ps(_mm512_min_ps(v, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
        return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));  // half to even
    };
    const __m256i low = _mm256_set_m128i(sixteen(16), sixteen(0));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low),
                              _mm256_set_m128i(sixteen(48), sixteen(32)), 1);
}

// Quads of eight rows, rows to neighbours: two[i] are the eight rows of quads i and 4 + i, or, from
// i = 4 on, of 4 + i and 8 + i.
inline void rows_side_by_side(const __m512i* rows, __m512i* two) {
    __m512i four[2][4];
    PLYWEIGHT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const __m512i* r = rows + 4 * half;
        const __m512i low[2] = {_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpacklo_epi32(r[2], r[3])};
        const __m512i high[2] = {_mm512_unpackhi_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[2], r[3])};
        four[half][0] = _mm512_unpacklo_epi64(low[0], low[1]);
        four[half][1] = _mm512_unpackhi_epi64(low[0], low[1]);
        four[half][2] = _mm512_unpacklo_epi64(high[0], high[1]);
        four[half][3] = _mm512_unpackhi_epi64(high[0], high[1]);
    }
    const __m512i near = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i far = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    PLYWEIGHT_UNROLL
    for (int i = 0; i < 4; ++i) {
        two[i] = _mm512_permutex2var_epi64(four[0][i], near, four[1][i]);
        two[4 + i] = _mm512_permutex2var_epi64(four[0][i], far, four[1][i]);
    }
}

// What pack_int8_rows computes, and corrections: what `bias`, which every byte of the weight is higher
// than its level, adds to a sum is taken away.
inline void pack_biased_rows(const ProductJob& job, const float* x, std::size_t row_block,
                             std::int8_t* codes, float* code_scales, std::int32_t* corrections,
                             std::int32_t bias) {
    static_assert(kBlockRows == 8);
    const std::size_t begin = first_row(job.m, job.num_row_blocks, row_block);
    const std::size_t rows = first_row(job.m, job.num_row_blocks, row_block + 1) - begin;
    const auto there = static_cast<__mmask8>(lanes(rows));
    for (std::size_t group = 0; group < job.num_groups; ++group) {
        const float* from = x + begin * job.in + group * job.group_size;
        const std::size_t count = smaller(job.group_size, job.in - group * job.group_size);
        const std::size_t at = begin * job.num_groups + group * rows;

        // Magnitudes as integers have the order of the numbers, with NaN above infinity.
        __m512i largest[kBlockRows];
        for (std::size_t row = 0; row < kBlockRows; ++row) {
            largest[row] = _mm512_setzero_si512();
            if (row >= rows) continue;
            for (std::size_t i = 0; i < count; i += 16) {
                const __m512i bits =
                    _mm512_maskz_loadu_epi32(lanes(count - i), from + row * job.in + i);
                largest[row] = _mm512_max_epi32(
                    largest[row], _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
            }
        }
        const __m256i peaks = largest_lanes(largest);
        const __m256 scales = _mm256_div_ps(_mm256_castsi256_ps(peaks), _mm256_set1_ps(127.0f));
        const __mmask8 is_finite = _mm256_cmplt_epi32_mask(peaks, _mm256_set1_epi32(0x7f800000));
        const __mmask8 is_plain =
            _mm256_mask_cmp_ps_mask(is_finite, scales, _mm256_setzero_ps(), _CMP_GT_OQ);
        _mm256_mask_storeu_ps(
            code_scales + at, there,
            _mm256_mask_blend_ps(is_finite, _mm256_set1_ps(__builtin_nanf("")), scales));
        float divisors[kBlockRows];
        _mm256_storeu_ps(divisors, scales);

        std::int8_t* to =
            codes + (begin * job.row_blocks + group * job.group_blocks * rows) * kBlockInputs;
        const std::size_t quads = (count + kBlockInputs - 1) / kBlockInputs * 4;
        __m512i sums = _mm512_setzero_si512();
        for (std::size_t quad = 0; quad < quads; quad += 16) {
            __m512i of_rows[kBlockRows], two[8];
            const std::size_t done = 4 * quad;
            for (std::size_t row = 0; row < kBlockRows; ++row) {
                of_rows[row] = row < rows && (is_plain >> row & 1) && done < count
                                   ? codes_of(from + row * job.in + done, count - done, divisors[row])
                                   : _mm512_setzero_si512();
            }
            rows_side_by_side(of_rows, two);
            const auto store = [&](std::size_t i, __m256i found) {
                if (quad + i < quads) _mm256_mask_storeu_epi32(to + (quad + i) * rows * 4, there, found);
            };
            PLYWEIGHT_UNROLL
            for (std::size_t i = 0; i < 8; ++i) {
                add_products(sums, _mm512_set1_epi8(1), two[i]);
                store(i + i / 4 * 4, _mm512_castsi512_si256(two[i]));
                store(i + i / 4 * 4 + 4, _mm512_extracti64x4_epi64(two[i], 1));
            }
        }
        const __m256i sum = _mm256_add_epi32(_mm512_castsi512_si256(sums),
                                             _mm512_extracti64x4_epi64(sums, 1));
        _mm256_mask_storeu_epi32(corrections + at, there,
                                 _mm256_mullo_epi32(sum, _mm256_set1_epi32(-bias)));
    }
}

}  // namespace
}  // namespace plyweight::avx512
