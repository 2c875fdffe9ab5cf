// From planes to codes, in whatever registers a variant has. Each variant's file includes this and
// compiles it with flags of its own, so nothing here has external linkage.
//
// A register holds 8 bits of every plane for each of its bytes; of plane p, bit (4 h + i) ^ p belongs to
// half h of the rows and quad i of the inputs (layout.hpp), which is an item here. Planes are merged in
// three steps of a transposition: planes to pairs of bits, pairs to nibbles, nibbles to bytes. A step
// takes half of the items' bits from where they are, for that is how planes are laid out, and shifts the
// others into place. What it takes from a shifted register never comes out of another byte, so words of
// any length can be shifted.
//
// `Bits` is a register of kBytes: load, store, fill(byte), &, ^, select(mask, a, b) (a where mask is 1, else
// b), and for the functions below <<, >> and add_negative(bytes), which adds one to those below 128. One
// that has a function `codes` of its own needs none of the latter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.hpp"
#include "product_job.hpp"

namespace plyweight {
namespace {

// Of each two neighbouring fields of n bits the upper one.
template <int n>
constexpr std::uint8_t kUpperFields = n == 1 ? 0xaa : n == 2 ? 0xcc : 0xf0;

// Two registers of fields of n bits, the first's are the upper ones, to two of fields of 2 n: of items
// whose number has the bit n, and of those that have not.
template <int n, class Bits>
inline void merge(Bits first, Bits second, Bits& with, Bits& without) {
    const Bits mask = Bits::fill(kUpperFields<n>);
    without = Bits::select(mask, first << n, second >> n);
    with = Bits::select(mask, first, second);
}

// 1 to 4 planes: for each quad of inputs, a register whose high nibbles are the codes of the high
// half of the rows, its low nibbles those of the low half; codes at the top of nibbles, then zeros.
template <int count, class Bits>
inline void nibbles(const Bits* planes, Bits* quads) {
    if constexpr (count == 1) {
        const Bits mask = Bits::fill(0x88);
        quads[3] = planes[0] & mask;
        quads[2] = (planes[0] << 1) & mask;
        quads[1] = (planes[0] << 2) & mask;
        quads[0] = (planes[0] << 3) & mask;
    } else {
        Bits odd, even;
        merge<1>(planes[0], planes[1], odd, even);
        if constexpr (count == 2) {
            const Bits mask = Bits::fill(0xcc);
            quads[3] = odd & mask;
            quads[1] = (odd << 2) & mask;
            quads[2] = even & mask;
            quads[0] = (even << 2) & mask;
        } else {
            Bits odd_low, even_low;
            if constexpr (count == 3) {
                odd_low = planes[2] & Bits::fill(0xaa);
                even_low = (planes[2] << 1) & Bits::fill(0xaa);
            } else {
                merge<1>(planes[2], planes[3], odd_low, even_low);
            }
            merge<2>(odd, odd_low, quads[3], quads[1]);
            merge<2>(even, even_low, quads[2], quads[0]);
        }
    }
}

// The codes of every half and quad, at the top of bytes; below `bits`, zeros. At 8 bits levels + 128.
// A register may have a function of its own, in its namespace.
template <int bits, class Bits>
inline void codes(const Bits* planes, Bits (*halves)[4]) {
    Bits tops[4];
    nibbles<(bits < 4 ? bits : 4)>(planes, tops);
    if constexpr (bits <= 4) {
        const Bits high = Bits::fill(0xf0);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            halves[1][quad] = tops[quad] & high;
            halves[0][quad] = (tops[quad] << 4) & high;
        }
    } else {
        Bits lows[4];
        nibbles<bits - 4>(planes + 4, lows);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            merge<4>(tops[quad], lows[quad], halves[1][quad], halves[0][quad]);
            if constexpr (bits == 8) {
                halves[1][quad] = Bits::add_negative(halves[1][quad]);
                halves[0][quad] = Bits::add_negative(halves[0][quad]);
            }
        }
    }
}

// Levels as bytes; `flip` is 0 for level + 128, 0x80 for the level itself. Decoded are `count`
// lines of each plane, to 8 `count` lines: of each block its quads, of each quad its halves.
template <int bits, class Bits>
inline void decode_lines(const std::uint8_t* const* planes, std::size_t line, std::size_t count,
                         std::uint8_t flip, std::uint8_t* out) {
    const Bits rest = Bits::fill(static_cast<std::uint8_t>((1 << (8 - bits) >> 1) ^ flip));
    for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t part = 0; part < kLineBytes; part += Bits::kBytes) {
            Bits held[bits], halves[2][4];
            PLYWEIGHT_UNROLL
            for (int p = 0; p < bits; ++p) {
                held[p] = Bits::load(planes[p] + (line + i) * kLineBytes + part);
            }
            codes<bits>(held, halves);
            PLYWEIGHT_UNROLL
            for (int quad = 0; quad < 4; ++quad) {
                PLYWEIGHT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    (halves[half][quad] ^ rest)
                        .store(out + ((i * 4 + quad) * 2 + half) * kLineBytes + part);
                }
            }
        }
    }
}

template <class Bits>
inline void decode(const std::uint8_t* const* planes, int bits, std::size_t line, std::size_t count,
                   std::uint8_t flip, std::uint8_t* out) {
    switch (bits) {
        case 1: return decode_lines<1, Bits>(planes, line, count, flip, out);
        case 2: return decode_lines<2, Bits>(planes, line, count, flip, out);
        case 3: return decode_lines<3, Bits>(planes, line, count, flip, out);
        case 4: return decode_lines<4, Bits>(planes, line, count, flip, out);
        case 5: return decode_lines<5, Bits>(planes, line, count, flip, out);
        case 6: return decode_lines<6, Bits>(planes, line, count, flip, out);
        case 7: return decode_lines<7, Bits>(planes, line, count, flip, out);
        default: return decode_lines<8, Bits>(planes, line, count, flip, out);
    }
}

}  // namespace
}  // namespace plyweight
