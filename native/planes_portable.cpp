// Eight codes at a time, as the bytes of one 64-bit word. Nothing here depends on the byte order.

#include <algorithm>

#include "planes.hpp"

namespace plyweight::portable {
namespace {

constexpr std::uint64_t kOnes = 0x0101010101010101ULL;  // the lowest bit of every byte

// The eight lowest bits of the bytes, next to each other: a bit at 8 i comes to 56 + i, and all
// other products lie elsewhere, so that nothing carries.
constexpr std::uint8_t gathered(std::uint64_t bits) {
    return static_cast<std::uint8_t>((bits & kOnes) * 0x0102040810204080ULL >> 56);
}

// The other way round, of every byte there is.
constexpr auto kSpread = [] {
    std::array<std::uint64_t, 256> words{};
    for (std::size_t byte = 0; byte < 256; ++byte) {
        for (std::size_t i = 0; i < 8; ++i) words[byte] |= (byte >> i & 1ULL) << 8 * i;
    }
    return words;
}();

std::uint64_t load(const std::uint8_t* bytes) {
    std::uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= std::uint64_t{bytes[i]} << 8 * i;
    return word;
}

void store(std::uint8_t* bytes, std::uint64_t word) {
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<std::uint8_t>(word >> 8 * i);
}

// With the number of planes known to the compiler, the loops over them are gone.
template <int num_planes>
std::uint8_t pack(const std::uint8_t* codes, std::size_t num_codes, std::size_t done,
                  const PlanesOut& out) {
    const PlanesOut planes = out;  // which no store below can change
    std::uint64_t seen = 0;
    const auto pack_byte = [&](std::size_t byte, std::uint64_t word) {
        seen |= word;
        for (int row = 0; row < num_planes; ++row) {
            planes[static_cast<std::size_t>(row)][byte] = gathered(word >> (num_planes - 1 - row));
        }
    };
    const std::size_t whole = num_codes / 8;
    for (std::size_t byte = done / 8; byte < whole; ++byte) pack_byte(byte, load(codes + 8 * byte));
    if (num_codes % 8 != 0) {
        std::uint8_t last[8] = {};  // the padding is zero
        std::copy(codes + 8 * whole, codes + num_codes, last);
        pack_byte(whole, load(last));
    }
    for (int shift = 32; shift >= 8; shift /= 2) seen |= seen >> shift;
    return static_cast<std::uint8_t>(seen);
}

template <int num_planes>
void unpack(const PlanesIn& in, std::uint8_t* codes, std::size_t num_codes, std::size_t done) {
    const PlanesIn planes = in;  // which no store below can change
    const auto unpack_byte = [&](std::size_t byte) {
        std::uint64_t word = 0;
        for (std::size_t row = 0; row < num_planes; ++row) {
            word = word << 1 | kSpread[planes[row][byte]];  // each plane refines every code by a bit
        }
        return word;
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

}  // namespace

std::uint8_t pack(const std::uint8_t* codes, std::size_t num_codes, std::size_t done,
                  const PlanesOut& planes, int num_planes) {
    switch (num_planes) {
        case 1: return pack<1>(codes, num_codes, done, planes);
        case 2: return pack<2>(codes, num_codes, done, planes);
        case 3: return pack<3>(codes, num_codes, done, planes);
        case 4: return pack<4>(codes, num_codes, done, planes);
        case 5: return pack<5>(codes, num_codes, done, planes);
        case 6: return pack<6>(codes, num_codes, done, planes);
        case 7: return pack<7>(codes, num_codes, done, planes);
        default: return pack<8>(codes, num_codes, done, planes);
    }
}

void unpack(const PlanesIn& planes, int num_planes, std::uint8_t* codes, std::size_t num_codes,
            std::size_t done) {
    switch (num_planes) {
        case 1: return unpack<1>(planes, codes, num_codes, done);
        case 2: return unpack<2>(planes, codes, num_codes, done);
        case 3: return unpack<3>(planes, codes, num_codes, done);
        case 4: return unpack<4>(planes, codes, num_codes, done);
        case 5: return unpack<5>(planes, codes, num_codes, done);
        case 6: return unpack<6>(planes, codes, num_codes, done);
        case 7: return unpack<7>(planes, codes, num_codes, done);
        default: return unpack<8>(planes, codes, num_codes, done);
    }
}

}  // namespace plyweight::portable
