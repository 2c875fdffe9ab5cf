// Eight codes at a time: eight bytes are a matrix of 8 x 8 bits, and its transpose is their planes.

#include <algorithm>

#include "planes.hpp"

namespace plyweight::portable {
namespace {

// Bit c of byte r becomes bit r of byte c, counted from the lowest: swaps within blocks of 2 x 2,
// then 4 x 4, then 8 x 8 (Warren, Hacker's Delight, 7-3).
constexpr std::uint64_t transposed(std::uint64_t x) {
    std::uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aaULL;
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000cccc0000ccccULL;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000f0f0f0f0ULL;
    return x ^ t ^ t << 28;
}

// Written out, so that the byte order of the machine does not matter; compilers make it one load.
std::uint64_t load(const std::uint8_t* bytes) {
    std::uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= std::uint64_t{bytes[i]} << 8 * i;
    return word;
}

void store(std::uint8_t* bytes, std::uint64_t word) {
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<std::uint8_t>(word >> 8 * i);
}

}  // namespace

std::uint8_t pack(const std::uint8_t* codes, std::size_t num_codes, std::size_t done,
                  const PlanesOut& planes, int num_planes) {
    std::uint64_t seen = 0;
    const auto pack_byte = [&](std::size_t byte, std::uint64_t word) {
        seen |= word;
        const std::uint64_t bits = transposed(word);
        for (int row = 0; row < num_planes; ++row) {
            planes[static_cast<std::size_t>(row)][byte] =
                static_cast<std::uint8_t>(bits >> 8 * (num_planes - 1 - row));
        }
    };
    const std::size_t whole = num_codes / 8;
    for (std::size_t byte = done / 8; byte < whole; ++byte) pack_byte(byte, load(codes + 8 * byte));
    if (num_codes % 8 != 0) {
        std::uint8_t last[8] = {};  // the padding is zero
        std::copy(codes + 8 * whole, codes + num_codes, last);
        pack_byte(whole, load(last));
    }
    std::uint8_t bytes[8];
    store(bytes, seen);
    return static_cast<std::uint8_t>(bytes[0] | bytes[1] | bytes[2] | bytes[3] | bytes[4] |
                                     bytes[5] | bytes[6] | bytes[7]);
}

void unpack(const PlanesIn& planes, int num_planes, std::uint8_t* codes, std::size_t num_codes,
            std::size_t done) {
    const auto unpack_byte = [&](std::size_t byte) {
        std::uint64_t bits = 0;
        for (int row = 0; row < num_planes; ++row) {
            bits = bits << 8 | planes[static_cast<std::size_t>(row)][byte];
        }
        return transposed(bits);
    };
    const std::size_t whole = num_codes / 8;
    for (std::size_t byte = done / 8; byte < whole; ++byte) {
        store(codes + 8 * byte, unpack_byte(byte));
    }
    if (num_codes % 8 != 0) {
        std::uint8_t last[8];
        store(last, unpack_byte(whole));
        std::copy(last, last + num_codes % 8, codes + 8 * whole);
    }
}

}  // namespace plyweight::portable
