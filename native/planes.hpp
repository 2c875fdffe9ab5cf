// Codes to bit planes and back: what plyweight/codec/planes.py defines, in every variant.
//
// A plane holds one bit of each code, eight codes to a byte, the first in the lowest bit. Planes are
// ordered by significance, the highest first; a code has as many bits as there are planes, 1 to 8.
//
// The sizes are the caller's word: nothing here checks them, module.cpp does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu.hpp"

namespace plyweight {

inline constexpr int kMaxPlanes = 8;

// Bytes of the planes, each where it lies: layers of an artifact come in different buffers.
using PlanesIn = std::array<const std::uint8_t*, kMaxPlanes>;
using PlanesOut = std::array<std::uint8_t*, kMaxPlanes>;

constexpr std::size_t plane_bytes(std::size_t num_codes) { return num_codes / 8 + (num_codes % 8 != 0); }

// Cuts codes into planes. Returns all codes, or-ed: a bit beyond num_planes is a code that does not
// fit, and the planes are then worthless.
std::uint8_t pack(Variant variant, const std::uint8_t* codes, std::size_t num_codes,
                  const PlanesOut& planes, int num_planes);

// Puts codes together again, num_codes of them.
void unpack(Variant variant, const PlanesIn& planes, int num_planes, std::uint8_t* codes,
            std::size_t num_codes);

// The same, and then the level of each code, in two's complement: what plyweight/codec/codes.py
// defines as decode.
void unpack_levels(Variant variant, const PlanesIn& planes, int num_planes, std::uint8_t* levels,
                   std::size_t num_codes);

// The variants. Each takes as many whole bytes of the planes as it works on at once, from the first
// on, and says how many codes that were; planes_portable.cpp takes the rest from `done` on.
//
// Their files are compiled with flags of their own, so they must not instantiate or define anything
// inline that another file uses as well: the linker would keep one of the two for both.
namespace portable {
std::uint8_t pack(const std::uint8_t* codes, std::size_t num_codes, std::size_t done,
                  const PlanesOut& planes, int num_planes);
void unpack(const PlanesIn& planes, int num_planes, std::uint8_t* codes, std::size_t num_codes,
            std::size_t done);
}  // namespace portable

#define PLYWEIGHT_PLANES_VARIANT(name)                                                             \
    namespace name {                                                                               \
    std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes, \
                     int num_planes, std::uint8_t& seen);                                          \
    std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,     \
                       std::size_t num_codes);                                                     \
    }
PLYWEIGHT_PLANES_VARIANT(neon)
PLYWEIGHT_PLANES_VARIANT(avx2)
PLYWEIGHT_PLANES_VARIANT(avx512)
#undef PLYWEIGHT_PLANES_VARIANT

}  // namespace plyweight
