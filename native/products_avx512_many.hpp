// Tiles times more rows than are multiplied while a tile is being decoded, in AVX-512.
// Part of products_avx512.cpp, and compiled with it alone.
//
// Up to 256 inputs of a tile are decoded to the first cache and multiplied with all rows of a slab, a
// block of up to eight at a time. Sums of a group stay in registers from their first product to the
// addition to y, if the group is decoded at once: for groups of 32, storing and loading them took as
// long as half of the products.
#pragma once

#include <immintrin.h>

#include "products_tiles.hpp"

namespace plyweight::avx512 {
namespace {

// Decoded bytes: whole groups, or a part of one.
struct Chunk {
    const std::uint8_t* bytes;
    std::size_t group, block, num_blocks;
    bool begins_group, ends_group;
};

// The next chunk from a block on.
inline Chunk chunk_at(const ProductJob& job, std::size_t block, const std::uint8_t* bytes) {
    const std::size_t group = block / job.group_blocks;
    if (job.group_blocks <= kChunkBlocks) {
        const std::size_t whole = kChunkBlocks / job.group_blocks * job.group_blocks;
        return {bytes, group, block, smaller(whole, job.row_blocks - block), true, true};
    }
    const std::size_t end = smaller((group + 1) * job.group_blocks, job.row_blocks);
    const std::size_t count = smaller(kChunkBlocks, end - block);
    return {bytes, group, block, count, block == group * job.group_blocks, block + count == end};
}

// Adds the products of a chunk with a block of rows to y, or, of a part of a group, to `sums`; both
// are (rows, 32). Not inlined: among everything else in its caller, sums would not stay in registers.
template <int rows>
[[gnu::noinline]] void multiply(const ProductJob& job, const Chunk& chunk, std::size_t first_row,
                                const float* scales, std::int32_t* sums, float* y) {
    const std::uint8_t* w = chunk.bytes;
    const std::int8_t* x = job.codes + (first_row * job.row_blocks + chunk.block * rows) * kBlockInputs;
    const std::size_t begin = first_row * job.num_groups + chunk.group * rows;
    const std::int32_t* corrections = job.corrections + begin;
    const float* code_scales = job.code_scales + begin;
    scales += chunk.group * kTileRows;
    for (std::size_t left = chunk.num_blocks; left > 0;) {
        const std::size_t blocks = smaller(job.group_blocks, left);
        __m512i sum[rows][2];
        PLYWEIGHT_UNROLL
        for (int row = 0; row < rows; ++row) {
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                sum[row][half] = chunk.begins_group
                                     ? _mm512_set1_epi32(corrections[row])
                                     : _mm512_loadu_si512(sums + row * 32 + half * 16);
            }
        }
        for (std::size_t quad = 0; quad < 4 * blocks; ++quad, w += 2 * kLineBytes, x += 4 * rows) {
            const __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + kLineBytes);
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                const __m512i codes = four(x + 4 * row);
                add_products(sum[row][0], low, codes);
                add_products(sum[row][1], high, codes);
            }
        }
        if (!chunk.ends_group) {
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                _mm512_storeu_si512(sums + row * 32, sum[row][0]);
                _mm512_storeu_si512(sums + row * 32 + 16, sum[row][1]);
            }
            return;
        }
        const __m512 scale[2] = {_mm512_loadu_ps(scales), _mm512_loadu_ps(scales + 16)};
        PLYWEIGHT_UNROLL
        for (int row = 0; row < rows; ++row) {
            const __m512 code_scale = _mm512_set1_ps(code_scales[row]);
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                float* to = y + row * 32 + half * 16;
                const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[row][half]),
                                                  _mm512_mul_ps(code_scale, scale[half]));
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), term));
            }
        }
        corrections += rows;
        code_scales += rows;
        scales += kTileRows;
        left -= blocks;
    }
}

// A tile times all rows, a slab at a time. `scales` is (groups, 32).
inline void many_rows(const ProductJob& job, std::size_t tile, const float* scales,
                      std::int32_t* sums, float* y) {
    alignas(kLineBytes) std::uint8_t bytes[kChunkBlocks * 8 * kLineBytes];
    constexpr std::size_t slab_blocks = kSlabRows / kBlockRows;
    for (std::size_t slab = 0; slab < job.num_row_blocks; slab += slab_blocks) {
        const std::size_t slab_end = smaller(slab + slab_blocks, job.num_row_blocks);
        const std::size_t begin = first_row(job.m, job.num_row_blocks, slab);
        const std::size_t end = first_row(job.m, job.num_row_blocks, slab_end);
        for (std::size_t i = 0; i < (end - begin) * kTileRows; ++i) y[i] = 0.0f;
        for (std::size_t block = 0; block < job.row_blocks;) {
            const Chunk chunk = chunk_at(job, block, bytes);
            decode<Register>(job.planes, job.bits, tile * job.row_blocks + block, chunk.num_blocks, 0,
                             bytes);
            for (std::size_t i = slab; i < slab_end; ++i) {
                const std::size_t first = first_row(job.m, job.num_row_blocks, i);
                const std::size_t rows = first_row(job.m, job.num_row_blocks, i + 1) - first;
                const std::size_t place = (first - begin) * kTileRows;
                with_rows(rows, [&]<int n>() {
                    multiply<n>(job, chunk, first, scales, sums + place, y + place);
                });
            }
            block += chunk.num_blocks;
        }
        store_tile(job, tile, begin, end - begin, y);
    }
}

}  // namespace
}  // namespace plyweight::avx512
