// A product, tile by tile, for every variant; of AVX-512 in the mode int8 it has the rest
// (products_avx512_many.hpp). Each variant's file includes this and compiles it with flags of its own,
// so nothing here has external linkage.
//
// `Isa` is what a variant has of its own:
//     Bits                         registers to decode with (products_decode.hpp)
//     dot<rows>(w, quads, x, sums, first)        sums (rows, 32) of levels w, codes x: int32
//     float_dot<rows>(w, quads, x, sums, first)  the same of levels w and floats x
// which start from zero at the first of several calls, and else add to the sums.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product_job.hpp"
#include "products_decode.hpp"

namespace plyweight {
namespace {

constexpr std::size_t kTileSums = kSlabRows * kTileRows;

constexpr std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Calls `visit` with the number of rows as a constant.
template <class Visit>
inline void with_rows(std::size_t rows, Visit visit) {
    switch (rows) {
        case 1: return visit.template operator()<1>();
        case 2: return visit.template operator()<2>();
        case 3: return visit.template operator()<3>();
        case 4: return visit.template operator()<4>();
        case 5: return visit.template operator()<5>();
        case 6: return visit.template operator()<6>();
        case 7: return visit.template operator()<7>();
        default: return visit.template operator()<8>();
    }
}

// A thread's scratch: results of a slab, sums of a slab, and scales of a tile where there is a gain.
inline float* results_of(float* scratch) { return scratch; }
inline float* float_sums_of(float* scratch) { return scratch + kTileSums; }
inline std::int32_t* int8_sums_of(float* scratch) {
    return reinterpret_cast<std::int32_t*>(scratch + kTileSums);
}

// Scales of a tile with the gain, (groups, 32).
inline const float* tile_scales(const ProductJob& job, std::size_t tile, float* scratch) {
    const std::size_t count = job.num_groups * kTileRows;
    const float* scales = job.scales + tile * count;
    if (job.gain == 1.0f) return scales;
    float* gained = scratch + 2 * kTileSums;
    for (std::size_t i = 0; i < count; ++i) gained[i] = scales[i] * job.gain;
    return gained;
}

inline void store_tile(const ProductJob& job, std::size_t tile, std::size_t first, std::size_t rows,
                       const float* y) {
    const std::size_t columns = smaller(kTileRows, job.out - tile * kTileRows);
    for (std::size_t row = 0; row < rows; ++row) {
        float* to = job.y + (first + row) * job.out + tile * kTileRows;
        for (std::size_t i = 0; i < columns; ++i) to[i] = y[row * kTileRows + i];
    }
}

// Decodes a tile, chunk by chunk, for a slab of rows at a time. `dot(first row of the block, rows of
// it, row in the slab, levels, first block, blocks, is it the group's first chunk)` sums;
// `finish(group, first row of the block, rows of it, row in the slab)` scales the sums of a group and
// adds them to y.
template <class Bits, class Dot, class Finish>
inline void for_each_slab(const ProductJob& job, std::size_t tile, float* y, Dot dot, Finish finish) {
    alignas(kLineBytes) std::uint8_t bytes[kChunkBlocks * 8 * kLineBytes];
    constexpr std::size_t slab_blocks = kSlabRows / kBlockRows;
    for (std::size_t slab = 0; slab < job.num_row_blocks; slab += slab_blocks) {
        const std::size_t slab_end = smaller(slab + slab_blocks, job.num_row_blocks);
        const std::size_t begin = first_row(job.m, job.num_row_blocks, slab);
        const std::size_t end = first_row(job.m, job.num_row_blocks, slab_end);
        const auto for_each_block = [&](auto visit) {
            for (std::size_t i = slab; i < slab_end; ++i) {
                const std::size_t first = first_row(job.m, job.num_row_blocks, i);
                visit(first, first_row(job.m, job.num_row_blocks, i + 1) - first, first - begin);
            }
        };
        for (std::size_t i = 0; i < (end - begin) * kTileRows; ++i) y[i] = 0.0f;
        for (std::size_t group = 0; group < job.num_groups; ++group) {
            const std::size_t group_begin = group * job.group_blocks;
            const std::size_t group_end = smaller(group_begin + job.group_blocks, job.row_blocks);
            for (std::size_t block = group_begin; block < group_end; block += kChunkBlocks) {
                const std::size_t count = smaller(kChunkBlocks, group_end - block);
                decode<Bits>(job.planes, job.bits, tile * job.row_blocks + block, count, 0x80, bytes);
                for_each_block([&](std::size_t first, std::size_t rows, std::size_t row) {
                    dot(first, rows, row, bytes, block, count, block == group_begin);
                });
            }
            for_each_block([&](std::size_t first, std::size_t rows, std::size_t row) {
                finish(group, first, rows, row);
            });
        }
        store_tile(job, tile, begin, end - begin, y);
    }
}

template <class Isa>
inline void int8_tile(const ProductJob& job, std::size_t tile, const float* scales, float* y,
                      std::int32_t* sums) {
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    for_each_slab<typename Isa::Bits>(
        job, tile, y,
        [&](std::size_t first, std::size_t rows, std::size_t row, const std::uint8_t* levels,
            std::size_t block, std::size_t count, bool is_first) {
            const std::int8_t* x = job.codes + first * inputs + block * kBlockInputs * rows;
            with_rows(rows, [&]<int n>() {
                Isa::template dot<n>(levels, 4 * count, x, sums + row * kTileRows, is_first);
            });
        },
        [&](std::size_t group, std::size_t first, std::size_t rows, std::size_t row) {
            const float* scale = scales + group * kTileRows;
            const float* code_scales = job.code_scales + first * job.num_groups + group * rows;
            for (std::size_t i = 0; i < rows; ++i) {
                const std::int32_t* sum = sums + (row + i) * kTileRows;
                float* to = y + (row + i) * kTileRows;
                for (std::size_t k = 0; k < kTileRows; ++k) {
                    to[k] += static_cast<float>(sum[k]) * (code_scales[i] * scale[k]);
                }
            }
        });
}

template <class Isa>
inline void float_tile(const ProductJob& job, std::size_t tile, const float* scales, float* y,
                       float* sums) {
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    for_each_slab<typename Isa::Bits>(
        job, tile, y,
        [&](std::size_t first, std::size_t rows, std::size_t row, const std::uint8_t* levels,
            std::size_t block, std::size_t count, bool is_first) {
            const float* x = job.floats + first * inputs + block * kBlockInputs * rows;
            with_rows(rows, [&]<int n>() {
                Isa::template float_dot<n>(levels, 4 * count, x, sums + row * kTileRows, is_first);
            });
        },
        [&](std::size_t group, std::size_t, std::size_t rows, std::size_t row) {
            const float* scale = scales + group * kTileRows;
            for (std::size_t i = row * kTileRows; i < (row + rows) * kTileRows; ++i) {
                y[i] += sums[i] * scale[i % kTileRows];
            }
        });
}

template <class Isa>
inline void int8_tiles_of(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch) {
    for (std::size_t tile = begin; tile < end; ++tile) {
        const float* scales = tile_scales(job, tile, scratch);
        int8_tile<Isa>(job, tile, scales, results_of(scratch), int8_sums_of(scratch));
    }
}

template <class Isa>
inline void float_tiles_of(const ProductJob& job, std::size_t begin, std::size_t end,
                           float* scratch) {
    for (std::size_t tile = begin; tile < end; ++tile) {
        const float* scales = tile_scales(job, tile, scratch);
        float_tile<Isa>(job, tile, scales, results_of(scratch), float_sums_of(scratch));
    }
}

template <class Bits>
inline void tile_levels_of(const ProductJob& job, std::size_t tile, std::int8_t* out) {
    alignas(kLineBytes) std::uint8_t bytes[kChunkBlocks * 8 * kLineBytes];
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    for (std::size_t block = 0; block < job.row_blocks; block += kChunkBlocks) {
        const std::size_t count = smaller(kChunkBlocks, job.row_blocks - block);
        decode<Bits>(job.planes, job.bits, tile * job.row_blocks + block, count, 0x80, bytes);
        for (std::size_t row = 0; row < kTileRows; ++row) {
            const std::uint8_t* from = bytes + row * 4;
            std::int8_t* to = out + row * inputs + block * kBlockInputs;
            for (std::size_t quad = 0; quad < 4 * count; ++quad) {
                __builtin_memcpy(to + quad * 4, from + quad * 2 * kLineBytes, 4);
            }
        }
    }
}

// Rounds rows of x to 8 bits, by group, and packs them: what a variant has without a way of its own.
inline void pack_int8_rows(const ProductJob& job, const float* x, std::size_t row_block,
                           std::int8_t* codes_out, float* code_scales) {
    constexpr std::size_t kPiece = 64;
    // Adding and taking away 1.5 * 2**23 rounds a small number to an integer, half to even.
    constexpr float rounder = 12582912.0f;
    const std::size_t begin = first_row(job.m, job.num_row_blocks, row_block);
    const std::size_t rows = first_row(job.m, job.num_row_blocks, row_block + 1) - begin;
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    std::int8_t* block_codes = codes_out + begin * inputs;
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t group = 0; group < job.num_groups; ++group) {
            const float* from = x + (begin + row) * job.in + group * job.group_size;
            const std::size_t count = smaller(job.group_size, job.in - group * job.group_size);
            // Magnitudes as integers have the order of the numbers, with NaN above infinity.
            std::int32_t peak_bits = 0;
            for (std::size_t i = 0; i < count; ++i) {
                std::int32_t word;
                __builtin_memcpy(&word, from + i, 4);
                word &= 0x7fffffff;
                peak_bits = word > peak_bits ? word : peak_bits;
            }
            float peak;
            __builtin_memcpy(&peak, &peak_bits, 4);
            const bool is_finite = peak_bits < 0x7f800000;
            const float scale = is_finite ? peak / 127.0f : __builtin_nanf("");
            const bool is_plain = is_finite && scale > 0.0f;
            const std::size_t padded =
                (count + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
            std::int8_t* to = block_codes + group * job.group_blocks * kBlockInputs * rows;
            for (std::size_t done = 0; done < padded; done += kPiece) {
                std::int8_t piece[kPiece] = {};
                const std::size_t here = done < count ? smaller(kPiece, count - done) : 0;
                if (is_plain) {
                    for (std::size_t i = 0; i < here; ++i) {
                        float v = from[done + i] / scale;
                        v = v > 127.0f ? 127.0f : v;
                        v = v < -127.0f ? -127.0f : v;
                        const auto code = static_cast<std::int32_t>((v + rounder) - rounder);
                        piece[i] = static_cast<std::int8_t>(code);
                    }
                }
                for (std::size_t quad = 0; 4 * quad < smaller(kPiece, padded - done); ++quad) {
                    __builtin_memcpy(to + ((done / 4 + quad) * rows + row) * 4, piece + 4 * quad, 4);
                }
            }
            code_scales[begin * job.num_groups + group * rows + row] = scale;
        }
    }
}

inline void pack_float_rows(const ProductJob& job, const float* x, std::size_t row_block,
                            float* floats) {
    const std::size_t begin = first_row(job.m, job.num_row_blocks, row_block);
    const std::size_t rows = first_row(job.m, job.num_row_blocks, row_block + 1) - begin;
    float* block = floats + begin * job.row_blocks * kBlockInputs;
    for (std::size_t group = 0; group < job.num_groups; ++group) {
        const std::size_t count = smaller(job.group_size, job.in - group * job.group_size);
        const std::size_t padded = (count + kBlockInputs - 1) / kBlockInputs * kBlockInputs;
        float* to = block + group * job.group_blocks * kBlockInputs * rows;
        for (std::size_t i = 0; i < padded; ++i) {
            for (std::size_t row = 0; row < rows; ++row) {
                to[i * rows + row] =
                    i < count ? x[(begin + row) * job.in + group * job.group_size + i] : 0.0f;
            }
        }
    }
}

}  // namespace
}  // namespace plyweight

// The functions that product_job.hpp declares for a variant, but for pack_int8 and int8_tiles.
#define PLYWEIGHT_DEFINE_PRODUCTS(Isa)                                                            \
    void pack_float(const ProductJob& job, const float* x, std::size_t row_block, float* floats) { \
        pack_float_rows(job, x, row_block, floats);                                               \
    }                                                                                             \
    void float_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch) { \
        float_tiles_of<Isa>(job, begin, end, scratch);                                            \
    }                                                                                             \
    void tile_levels(const ProductJob& job, std::size_t tile, std::int8_t* out) {                 \
        tile_levels_of<Isa::Bits>(job, tile, out);                                                \
    }
