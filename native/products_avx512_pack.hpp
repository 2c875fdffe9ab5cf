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

// Visits a row, 16 inputs at a time: visit(first input, them), with zeros after the last.
template <class Visit>
inline void for_sixteens(const float* x, std::size_t count, Visit visit) {
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) visit(i, _mm512_loadu_ps(x + i));
    if (i < count) visit(i, _mm512_maskz_loadu_ps(lanes(count - i), x + i));
}

// Codes of up to 32 inputs, then zeros.
inline __m256i codes_of(const float* x, std::size_t count, float scale) {
    const __m512 divisor = _mm512_set1_ps(scale);
    const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    __m128i codes[2] = {};
    for_sixteens(x, count, [&](std::size_t i, __m512 v) {
        v = _mm512_max_ps(_mm512_min_ps(_mm512_div_ps(v, divisor), most), least);
        codes[i / 16] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));  // half to even
    });
    return _mm256_set_m128i(codes[1], codes[0]);
}

// Quads of eight rows, rows to neighbours: of each of eight quads its rows.
inline void rows_side_by_side(const __m256i* rows, __m256i* quads) {
    __m256i four[2][4];  // rows of quads i and 4 + i
    PLYWEIGHT_UNROLL
    for (int half = 0; half < 2; ++half) {
        const __m256i* r = rows + 4 * half;
        const __m256i low[2] = {_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpacklo_epi32(r[2], r[3])};
        const __m256i high[2] = {_mm256_unpackhi_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[2], r[3])};
        four[half][0] = _mm256_unpacklo_epi64(low[0], low[1]);
        four[half][1] = _mm256_unpackhi_epi64(low[0], low[1]);
        four[half][2] = _mm256_unpacklo_epi64(high[0], high[1]);
        four[half][3] = _mm256_unpackhi_epi64(high[0], high[1]);
    }
    PLYWEIGHT_UNROLL
    for (int i = 0; i < 4; ++i) {
        quads[i] = _mm256_permute2x128_si256(four[0][i], four[1][i], 0x20);
        quads[4 + i] = _mm256_permute2x128_si256(four[0][i], four[1][i], 0x31);
    }
}

// The largest magnitudes of up to eight rows, as integers, which have the order of the numbers, with
// NaN above infinity; 0 of rows that there are not.
inline __m256i peaks_of(const float* x, std::size_t stride, std::size_t rows, std::size_t count) {
    __m512i largest[kBlockRows] = {};
    for (std::size_t row = 0; row < rows; ++row) {
        __m512i most = _mm512_setzero_si512();
        for_sixteens(x + row * stride, count, [&](std::size_t, __m512 v) {
            most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(v)));
        });
        largest[row] = most;
    }
    return largest_lanes(largest);
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

        const __m256i peaks = peaks_of(from, job.in, rows, count);
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
        __m256i sum = _mm256_setzero_si256();
        for (std::size_t i = 0; i < count; i += 32) {
            __m256i of_rows[kBlockRows], quads[8];
            for (std::size_t row = 0; row < kBlockRows; ++row) {
                of_rows[row] = row < rows && (is_plain >> row & 1)
                                   ? codes_of(from + row * job.in + i, smaller(32, count - i),
                                              divisors[row])
                                   : _mm256_setzero_si256();
            }
            // Groups are padded to blocks of four quads.
            if (rows == 1) {
                sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), of_rows[0]);
                const __mmask8 valid = i + 16 >= count ? 0x0f : 0xff;
                _mm256_mask_storeu_epi32(to + i, valid, of_rows[0]);
                continue;
            }
            rows_side_by_side(of_rows, quads);
            PLYWEIGHT_UNROLL
            for (std::size_t quad = 0; quad < 8; ++quad) {
                sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), quads[quad]);
                if (quad >= 4 && i + 16 >= count) continue;
                _mm256_mask_storeu_epi32(to + (i / 4 + quad) * rows * 4, there, quads[quad]);
            }
        }
        if (rows == 1) {  // whose lanes were quads and not rows
            sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 0x01));
            sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
            sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
        }
        _mm256_mask_storeu_epi32(corrections + at, there,
                                 _mm256_mullo_epi32(sum, _mm256_set1_epi32(-bias)));
    }
}

}  // namespace
}  // namespace plyweight::avx512
