// What a variant of the products computes, and the functions that do.
//
// The variants' files are compiled with flags of their own, so they must not instantiate or define
// anything with external linkage that another file uses as well: the linker would keep one of the two
// for both. Hence pointers and numbers alone, and no container.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.hpp"

// Before a short loop over registers: GCC takes arrays of them for memory where it finds out too late
// that a loop has a constant number of rounds.
#if defined(__GNUC__)
#define PLYWEIGHT_UNROLL _Pragma("GCC unroll 16")
#else
#define PLYWEIGHT_UNROLL
#endif

namespace plyweight {

// Rows of activations that are multiplied with a decoded weight while it is in registers.
inline constexpr std::size_t kBlockRows = 8;
// Rows of activations for which a tile is decoded once.
inline constexpr std::size_t kSlabRows = 64;
// Blocks that are decoded at a time: 8 KiB of the first cache.
inline constexpr std::size_t kChunkBlocks = 16;

// What a variant computes from. Pointers and numbers alone: its files share no code with others.
struct ProductJob {
    const std::uint8_t* planes[kMaxBits];
    int bits;
    std::size_t out, in, group_size, num_groups, group_blocks, row_blocks;
    const float* scales;  // (tiles, groups, 32)
    float gain;           // by which each of them is multiplied, rounded, before it is used
    std::size_t m;
    float* y;
    // Activations, packed: blocks of rows, one after the other, of which each input (float) or quad of
    // inputs (int8) has its rows side by side; padded like the inputs of the matrix, with zeros.
    std::size_t num_row_blocks;
    const std::int8_t* codes;
    const float* floats;
    // By block of rows, (groups, rows of the block): scales of the codes, and what is added to sums of
    // products with bytes to make them sums of products with levels, where a variant's bytes are others.
    const float* code_scales;
    const std::int32_t* corrections;
};

// Rows of block i of num_row_blocks: as equal as can be.
static inline std::size_t first_row(std::size_t m, std::size_t num_row_blocks, std::size_t i) {
    return m * i / num_row_blocks;
}

#define PLYWEIGHT_PRODUCTS_VARIANT(name)                                                          \
    namespace name {                                                                              \
    /* Packs rows of x: codes, code_scales and corrections (int8), or floats. */                  \
    void pack_int8(const ProductJob& job, const float* x, std::size_t row_block,                  \
                   std::int8_t* codes, float* code_scales, std::int32_t* corrections);            \
    void pack_float(const ProductJob& job, const float* x, std::size_t row_block, float* floats); \
    /* Columns of y that belong to tiles begin to end. */                                         \
    void int8_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch);   \
    void float_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch);  \
    /* Levels of a tile, (32, 16 row_blocks), padding included. */                                \
    void tile_levels(const ProductJob& job, std::size_t tile, std::int8_t* out);                  \
    }

PLYWEIGHT_PRODUCTS_VARIANT(portable)
#ifdef PLYWEIGHT_HAS_AVX2
PLYWEIGHT_PRODUCTS_VARIANT(avx2)
#endif
#ifdef PLYWEIGHT_HAS_AVX512
PLYWEIGHT_PRODUCTS_VARIANT(avx512)
#endif
#ifdef PLYWEIGHT_HAS_NEON
PLYWEIGHT_PRODUCTS_VARIANT(neon)
#endif
#undef PLYWEIGHT_PRODUCTS_VARIANT

}  // namespace plyweight
