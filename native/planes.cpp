#include "planes.hpp"

namespace plyweight {

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

}  // namespace plyweight
