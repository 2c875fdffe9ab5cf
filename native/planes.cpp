#include "planes.hpp"

#include <algorithm>

namespace plyweight {

namespace {

// They stay in the first cache between the two passes; whole bytes of the planes.
constexpr std::size_t kBlockCodes = 1U << 14U;

// Every compiler makes vectors of it by itself, on the baseline of its architecture too, once it
// knows how far to shift: bytes are shifted as words there, and masked.
template <int bit_width>
void decode(std::uint8_t* codes, std::size_t num_codes) {
    constexpr int dropped = kMaxPlanes - bit_width;
    constexpr auto half_cell = static_cast<std::uint8_t>((1 << dropped) >> 1);
    for (std::size_t i = 0; i < num_codes; ++i) {
        const auto byte = static_cast<std::uint8_t>(codes[i] << dropped);  // the sign is in bit 7
        const auto negative = static_cast<std::uint8_t>(-(byte >> 7));     // all ones, or none
        const auto magnitude = static_cast<std::uint8_t>((byte & 127) + half_cell);
        codes[i] = static_cast<std::uint8_t>((magnitude ^ negative) - negative);
    }
}

void decode(std::uint8_t* codes, std::size_t num_codes, int bit_width) {
    switch (bit_width) {
        case 1: return decode<1>(codes, num_codes);
        case 2: return decode<2>(codes, num_codes);
        case 3: return decode<3>(codes, num_codes);
        case 4: return decode<4>(codes, num_codes);
        case 5: return decode<5>(codes, num_codes);
        case 6: return decode<6>(codes, num_codes);
        case 7: return decode<7>(codes, num_codes);
        default: return decode<8>(codes, num_codes);
    }
}

}  // namespace

std::uint8_t pack(Variant variant, const std::uint8_t* codes, std::size_t num_codes,
                  const PlanesOut& planes, int num_planes) {
    std::uint8_t seen = 0;
    std::size_t done = 0;
    switch (variant) {
#ifdef PLYWEIGHT_HAS_NEON
        case Variant::neon:
            done = neon::pack(codes, num_codes, planes.data(), num_planes, seen);
            break;
#endif
#ifdef PLYWEIGHT_HAS_AVX2
        case Variant::avx2:
            done = avx2::pack(codes, num_codes, planes.data(), num_planes, seen);
            break;
#endif
#ifdef PLYWEIGHT_HAS_AVX512
        case Variant::avx512:
            done = avx512::pack(codes, num_codes, planes.data(), num_planes, seen);
            break;
#endif
        default:
            break;
    }
    return seen | portable::pack(codes, num_codes, done, planes, num_planes);
}

void unpack(Variant variant, const PlanesIn& planes, int num_planes, std::uint8_t* codes,
            std::size_t num_codes) {
    std::size_t done = 0;
    switch (variant) {
#ifdef PLYWEIGHT_HAS_NEON
        case Variant::neon:
            done = neon::unpack(planes.data(), num_planes, codes, num_codes);
            break;
#endif
#ifdef PLYWEIGHT_HAS_AVX2
        case Variant::avx2:
            done = avx2::unpack(planes.data(), num_planes, codes, num_codes);
            break;
#endif
#ifdef PLYWEIGHT_HAS_AVX512
        case Variant::avx512:
            done = avx512::unpack(planes.data(), num_planes, codes, num_codes);
            break;
#endif
        default:
            break;
    }
    portable::unpack(planes, num_planes, codes, num_codes, done);
}

void unpack_levels(Variant variant, const PlanesIn& planes, int num_planes, std::uint8_t* levels,
                   std::size_t num_codes) {
    for (std::size_t start = 0; start < num_codes; start += kBlockCodes) {
        const std::size_t count = std::min(kBlockCodes, num_codes - start);
        PlanesIn block{};
        for (int row = 0; row < num_planes; ++row) {
            const auto plane = static_cast<std::size_t>(row);
            block[plane] = planes[plane] + start / 8;
        }
        unpack(variant, block, num_planes, levels + start, count);
        decode(levels + start, count, num_planes);
    }
}

}  // namespace plyweight
