// Eight bytes of a plane at a time, in a word.

#include "products_tiles.hpp"

namespace plyweight::portable {
namespace {

struct Word {
    static constexpr std::size_t kBytes = 8;
    std::uint64_t bits;

    static Word fill(std::uint8_t byte) { return {byte * 0x0101010101010101ULL}; }
    static Word load(const std::uint8_t* from) {
        Word word;
        __builtin_memcpy(&word.bits, from, 8);  // of bytes that stay in order: no endianness
        return word;
    }
    void store(std::uint8_t* to) const { __builtin_memcpy(to, &bits, 8); }
    friend Word operator&(Word a, Word b) { return {a.bits & b.bits}; }
    friend Word operator^(Word a, Word b) { return {a.bits ^ b.bits}; }
    friend Word operator<<(Word a, int n) { return {a.bits << n}; }
    friend Word operator>>(Word a, int n) { return {a.bits >> n}; }
    static Word select(Word mask, Word a, Word b) { return {b.bits ^ ((a.bits ^ b.bits) & mask.bits)}; }
    static Word add_negative(Word bytes) {
        return {bytes.bits + (~bytes.bits >> 7 & 0x0101010101010101ULL)};
    }
};

struct Isa {
    using Bits = Word;

    template <int rows>
    static void dot(const std::uint8_t* w, std::size_t quads, const std::int8_t* x,
                    std::int32_t* sums, bool first) {
        if (first) {
            for (std::size_t i = 0; i < rows * kTileRows; ++i) sums[i] = 0;
        }
        for (std::size_t quad = 0; quad < quads; ++quad, w += 4 * kTileRows, x += 4 * rows) {
            for (std::size_t row = 0; row < rows; ++row) {
                for (std::size_t i = 0; i < kTileRows; ++i) {
                    std::int32_t sum = 0;
                    for (std::size_t q = 0; q < 4; ++q) {
                        sum += static_cast<std::int8_t>(w[4 * i + q]) * x[4 * row + q];
                    }
                    sums[row * kTileRows + i] += sum;
                }
            }
        }
    }

    template <int rows>
    static void float_dot(const std::uint8_t* w, std::size_t quads, const float* x, float* sums,
                          bool first) {
        if (first) {
            for (std::size_t i = 0; i < rows * kTileRows; ++i) sums[i] = 0.0f;
        }
        for (std::size_t quad = 0; quad < quads; ++quad, w += 4 * kTileRows) {
            for (std::size_t q = 0; q < 4; ++q, x += rows) {
                float level[kTileRows];
                for (std::size_t i = 0; i < kTileRows; ++i) {
                    level[i] = static_cast<std::int8_t>(w[4 * i + q]);
                }
                for (std::size_t row = 0; row < rows; ++row) {
                    for (std::size_t i = 0; i < kTileRows; ++i) {
                        sums[row * kTileRows + i] += level[i] * x[row];
                    }
                }
            }
        }
    }
};

}  // namespace

PLYWEIGHT_DEFINE_PRODUCTS(Isa)

void pack_int8(const ProductJob& job, const float* x, std::size_t row_block, std::int8_t* codes,
               float* code_scales, std::int32_t*) {
    pack_int8_rows(job, x, row_block, codes, code_scales);
}

void int8_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch) {
    int8_tiles_of<Isa>(job, begin, end, scratch);
}

}  // namespace plyweight::portable
