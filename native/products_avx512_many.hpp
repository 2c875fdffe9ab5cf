// Tiles times more rows than are multiplied while a tile is being decoded, in AVX-512.
// Part of products_avx512.cpp, and compiled with it alone.
//
// Up to 256 inputs of a tile are decoded to the first cache and multiplied with all rows of a slab, a
// block of up to eight at a time. Sums of a group stay in registers from their first product to the
// addition to y, if the group is decoded at once: for groups of 32, storing and loading them took as
// long as half of the products.
#pragma once

#include <immintrin.h>

#include "products_avx512.hpp"
#include "products_tiles.hpp"

namespace plyweight::avx512 {
namespace {

// Blocks that are decoded to `bytes`: whole groups, or a part of one.
struct Chunk {
    std::uint8_t* bytes;
    std::size_t tile, group, block, num_blocks;
    bool begins_group, ends_group;
};

// The chunk that begins with a block.
inline Chunk chunk_at(const ProductJob& job, std::size_t tile, std::size_t block,
                      std::uint8_t* bytes) {
    const std::size_t group = block / job.group_blocks;
    if (job.group_blocks <= kChunkBlocks) {
        const std::size_t whole = kChunkBlocks / job.group_blocks * job.group_blocks;
        return {bytes, tile, group, block, smaller(whole, job.row_blocks - block), true, true};
    }
    const std::size_t end = smaller((group + 1) * job.group_blocks, job.row_blocks);
    const std::size_t count = smaller(kChunkBlocks, end - block);
    return {bytes, tile, group, block, count, block == group * job.group_blocks, block + count == end};
}

// Adds the products of a chunk with a block of rows, of which `first` is the first, to y, or, of a part
// of a group, to `sums`; both are (rows, 32). With `bits` it decodes the chunk as well, for itself and
// for blocks of rows that come after, a line before its products: the processor does both at once. Not
// inlined: among everything else in its caller, sums would not stay in registers.
template <int rows, int bits = 0>
[[gnu::noinline]] void multiply(const ProductJob& job, const Chunk& chunk, std::size_t first,
                                const float* scales, std::int32_t* sums, float* y) {
    std::uint8_t* w = chunk.bytes;
    std::size_t line = chunk.tile * job.row_blocks + chunk.block;
    const std::int8_t* x = job.codes + (first * job.row_blocks + chunk.block * rows) * kBlockInputs;
    const std::size_t begin = first * job.num_groups + chunk.group * rows;
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
        for (std::size_t block = 0; block < blocks; ++block, ++line) {
            if constexpr (bits > 0) decode_lines<bits, Register>(job.planes, line, 1, 0, w);
            for (int quad = 0; quad < 4; ++quad, w += 2 * kLineBytes, x += 4 * rows) {
                const __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + kLineBytes);
                PLYWEIGHT_UNROLL
                for (int row = 0; row < rows; ++row) {
                    const __m512i codes = four(x + 4 * row);
                    add_products(sum[row][0], low, codes);
                    add_products(sum[row][1], high, codes);
                }
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
        const __m512 scale[2] = {_mm512_load_ps(scales), _mm512_load_ps(scales + 16)};
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

template <int rows>
void decode_and_multiply(const ProductJob& job, const Chunk& chunk, std::size_t first,
                         const float* scales, std::int32_t* sums, float* y) {
    switch (job.bits) {
        case 1: return multiply<rows, 1>(job, chunk, first, scales, sums, y);
        case 2: return multiply<rows, 2>(job, chunk, first, scales, sums, y);
        case 3: return multiply<rows, 3>(job, chunk, first, scales, sums, y);
        case 4: return multiply<rows, 4>(job, chunk, first, scales, sums, y);
        case 5: return multiply<rows, 5>(job, chunk, first, scales, sums, y);
        case 6: return multiply<rows, 6>(job, chunk, first, scales, sums, y);
        case 7: return multiply<rows, 7>(job, chunk, first, scales, sums, y);
        default: return multiply<rows, 8>(job, chunk, first, scales, sums, y);
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
        for (std::size_t block = 0; block < job.row_blocks;) {
            const Chunk chunk = chunk_at(job, tile, block, bytes);
            const std::size_t next = block + chunk.num_blocks;
            for (std::size_t i = slab; i < slab_end; ++i) {
                const std::size_t first = first_row(job.m, job.num_row_blocks, i);
                const std::size_t rows = first_row(job.m, job.num_row_blocks, i + 1) - first;
                float* to = y + (first - begin) * kTileRows;
                std::int32_t* own = sums + (first - begin) * kTileRows;
                // Stores are spread among products: y has rows a power of two apart, whose lines
                // take each other's place in the first cache, so that many at once would be waited for.
                if (block == 0) {
                    for (std::size_t k = 0; k < rows * kTileRows; ++k) to[k] = 0.0f;
                }
                with_rows(rows, [&]<int n>() {
                    // Blocks are as equal as can be: of five rows and more, none has fewer.
                    if constexpr (n >= static_cast<int>(kBlockRows) / 2) {
                        if (i == slab) decode_and_multiply<n>(job, chunk, first, scales, own, to);
                        else multiply<n>(job, chunk, first, scales, own, to);
                    }
                });
                if (next == job.row_blocks) store_tile(job, tile, first, rows, to);
            }
            block = next;
        }
    }
}

}  // namespace
}  // namespace plyweight::avx512
