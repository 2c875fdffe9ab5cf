// From planes to codes, in whatever registers a variant has. Each variant's file includes this and
// compiles it with flags of its own, so nothing here has external linkage.
//
// A register holds 8 bits of every plane for each of its bytes: bit 4 h + i belongs to half h of the
// rows and quad i of the inputs (layout.hpp). Planes are merged in three steps of a transposition:
// two planes to pairs of bits, pairs to nibbles, nibbles to bytes. What a step takes from a shifted
// register never comes out of another byte, so words of any length can be shifted.
//
// `Bits` is a register:  load, fill(byte), &, |, <<, >>, select(mask, a, b): a where mask is 1, else b.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.hpp"
#include "product_job.hpp"

namespace plyweight {
namespace {

constexpr int kHalfShift = 4;  // the low half of the rows has the low nibble

// Two planes: pairs of odd places (quads 3 and 1) and of even ones (2 and 0), first plane on top. Here
// and below a shifted register is taken first, so that the other may be overwritten.
template <class Bits>
inline void pairs(Bits first, Bits second, Bits& odd, Bits& even) {
    const Bits mask = Bits::fill(0xaa);
    even = Bits::select(mask, first << 1, second);
    odd = Bits::select(mask, first, second >> 1);
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
        pairs(planes[0], planes[1], odd, even);
        const Bits mask = Bits::fill(0xcc);
        if constexpr (count == 2) {
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
                pairs(planes[2], planes[3], odd_low, even_low);
            }
            quads[1] = Bits::select(mask, odd << 2, odd_low);
            quads[3] = Bits::select(mask, odd, odd_low >> 2);
            quads[0] = Bits::select(mask, even << 2, even_low);
            quads[2] = Bits::select(mask, even, even_low >> 2);
        }
    }
}

// Adds one to the codes below 128, of eight planes: levels + 128 (layout.hpp). Bits of 8 times as many
// codes as a register has bytes are added at once, with a carry that goes up from plane to plane.
template <class Bits>
inline void add_negative(Bits* planes) {
    Bits carry = planes[0] ^ Bits::fill(0xff);
    PLYWEIGHT_UNROLL
    for (int p = 7; p > 0; --p) {
        const Bits sum = planes[p] ^ carry;
        carry = planes[p] & carry;
        planes[p] = sum;
    }
    planes[0] = planes[0] ^ carry;
}

// The codes of every half and quad, at the top of bytes; below `bits`, zeros. At 8 bits levels + 128.
template <int bits, class Bits>
inline void codes(Bits* planes, Bits (*halves)[4]) {
    if constexpr (bits == 8) add_negative(planes);
    const Bits high = Bits::fill(0xf0);
    Bits tops[4];
    nibbles<(bits < 4 ? bits : 4)>(planes, tops);
    if constexpr (bits <= 4) {
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
            halves[0][quad] = Bits::select(high, tops[quad] << 4, lows[quad]);
            halves[1][quad] = Bits::select(high, tops[quad], lows[quad] >> 4);
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
