// Registers of the AVX-512 products, and the sums of a tile that is multiplied while it is being decoded.
// Part of products_avx512.cpp, and compiled with it alone.
#pragma once

#include <immintrin.h>

#include "products_decode.hpp"

namespace plyweight::avx512 {
namespace {

struct Register {
    static constexpr std::size_t kBytes = 64;
    __m512i bits;

    static Register fill(std::uint8_t byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
    static Register load(const std::uint8_t* from) { return {_mm512_load_si512(from)}; }
    void store(std::uint8_t* to) const { _mm512_store_si512(to, bits); }
    friend Register operator&(Register a, Register b) { return {_mm512_and_si512(a.bits, b.bits)}; }
    friend Register operator^(Register a, Register b) { return {_mm512_xor_si512(a.bits, b.bits)}; }
    // The instruction overwrites its first operand: `a`, which is often not needed any more, where the
    // mask would be copied every time.
    static Register select(Register mask, Register a, Register b) {
        return {_mm512_ternarylogic_epi32(a.bits, mask.bits, b.bits, 0xe2)};
    }
};

// An order of the bits of a byte, as the matrix that vgf2p8affineqb takes: bit o of a result is bit
// `from(o)` of what is ordered, and 0 where that is negative. Orders stand in tables, because GCC 12
// otherwise computes them at run time when it optimizes less.
template <class From>
constexpr std::uint64_t bit_order(From from) {
    std::uint64_t rows = 0;
    for (int bit = 0; bit < 8; ++bit) {
        if (from(bit) >= 0) rows |= std::uint64_t{1} << from(bit) << 8 * (7 - bit);
    }
    return rows;
}

// Orders of items. (No std::array: see product_job.hpp.)
struct Orders {
    std::uint64_t of[8];
};

// For the fields of `field` bits, bytes or both nibbles, of as many items, whose bit k is of plane
// k ^ item: plane 0 on top, then `bits - 1` more, then zeros.
template <int bits, int field>
constexpr Orders orders() {
    Orders found{};
    for (int item = 0; item < field; ++item) {
        found.of[item] = bit_order(
            [&](int bit) { return bit % field < field - bits ? -1 : bit ^ (field - 1) ^ item; });
    }
    return found;
}
template <int bits>
constexpr Orders kByteOrders = orders<bits, 8>();
template <int bits>
constexpr Orders kNibbleOrders = orders<bits, 4>();

constexpr std::uint64_t kNeighboursSwapped = bit_order([](int bit) { return bit ^ 1; });
constexpr std::uint64_t kTopEverywhere = bit_order([](int) { return 7; });

// The bytes of `r` in that order; bits of `flipped` are inverted then.
template <std::uint8_t flipped = 0>
inline Register ordered(Register r, std::uint64_t order) {
    const __m512i matrix = _mm512_set1_epi64(static_cast<long long>(order));
    return {_mm512_gf2p8affine_epi64_epi8(r.bits, matrix, flipped)};
}

// What `merge` does (products_decode.hpp), but all bits stay where they are.
template <int n>
inline void choose(Register first, Register second, Register& with, Register& without) {
    const Register mask = Register::fill(kUpperFields<n>);
    without = Register::select(mask, second, first);
    with = Register::select(mask, first, second);
}

// 1 to 4 planes: for each quad of inputs, a register whose high nibbles are the codes of the high half
// of the rows, its low nibbles those of the low half. Bit k of a nibble is of plane k ^ quad, or
// anything where there is no such plane.
template <int count>
inline void chosen_nibbles(const Register* planes, Register* quads) {
    Register odd = planes[0], even = planes[0];
    if constexpr (count > 1) choose<1>(planes[0], planes[1], odd, even);
    if constexpr (count <= 2) {
        quads[3] = quads[1] = odd;
        quads[2] = quads[0] = even;
    } else {
        Register odd_low = planes[2], even_low = planes[2];
        if constexpr (count > 3) choose<1>(planes[2], planes[3], odd_low, even_low);
        choose<2>(odd, odd_low, quads[3], quads[1]);
        choose<2>(even, even_low, quads[2], quads[0]);
    }
}

// What is said in products_decode.hpp, where it is found by the registers that it is called with.
template <int bits>
inline void codes(const Register* planes, Register (*halves)[4]) {
    Register tops[4], lows[4];
    chosen_nibbles<(bits < 4 ? bits : 4)>(planes, tops);
    if constexpr (bits > 4) chosen_nibbles<bits - 4>(planes + 4, lows);
    PLYWEIGHT_UNROLL
    for (int quad = 0; quad < 4; ++quad) {
        Register high = tops[quad], low = tops[quad];
        if constexpr (bits > 4) choose<4>(tops[quad], lows[quad], high, low);
        PLYWEIGHT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int item = 4 * half + quad;
            Register& code = halves[half][quad];
            code = half == 1 ? high : low;
            if (bits < 8 || item < 7) code = ordered(code, kByteOrders<bits>.of[item]);
            if constexpr (bits == 8) {
                // 0xff, which is -1, for bytes below 128.
                const Register negative = ordered<0xff>(code, kTopEverywhere);
                code = {_mm512_sub_epi8(code.bits, negative.bits)};
            }
        }
    }
}

// Adds, to each of 16 sums, products of four unsigned bytes of `w` and four signed ones of `x`.
// Written as an instruction, because GCC 12 copies every sum before and after the intrinsic, which
// makes a loop of eight rows 1.4 times as long.
inline void add_products(__m512i& sums, __m512i w, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
}

// Four codes of one row for every row of the weight.
inline __m512i four(const std::int8_t* x) {
    int word;
    __builtin_memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

// Sums of a group: of lines of every plane with one row of activations, for each half of the rows, and
// of the correction that they begin with. Where codes stay where they are in their bytes, a sum is of
// codes times a power of two; `total` brings all to codes at the top of bytes.
template <int bits>
struct LineSums;

// A bit of every byte is a code: sums of its eight places.
template <>
struct LineSums<1> {
    __m512i sum[8], correction;
    void begin(std::int32_t from) {
        PLYWEIGHT_UNROLL
        for (__m512i& s : sum) s = _mm512_setzero_si512();
        correction = _mm512_set1_epi32(from);
    }
    void add(const Register* planes, const std::int8_t* x) {
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            const __m512i codes = four(x + 4 * quad);
            PLYWEIGHT_UNROLL
            for (int place = quad; place < 8; place += 4) {
                const Register bit = planes[0] & Register::fill(static_cast<std::uint8_t>(1 << place));
                add_products(sum[place], bit.bits, codes);
            }
        }
    }
    __m512i total(int half) const {
        // 1, 2, 4 and 8 times a code, from the lowest place on.
        const __m512i* s = sum + 4 * half;
        const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(s[0], 3), _mm512_slli_epi32(s[1], 2));
        const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(s[2], 1), s[3]);
        const __m512i all = _mm512_slli_epi32(_mm512_add_epi32(low, high), half == 0 ? 4 : 0);
        return _mm512_add_epi32(all, correction);
    }
};

// Pairs of bits: sums of four places.
template <>
struct LineSums<2> {
    __m512i sum[4], correction;
    void begin(std::int32_t from) {
        PLYWEIGHT_UNROLL
        for (__m512i& s : sum) s = _mm512_setzero_si512();
        correction = _mm512_set1_epi32(from);
    }
    void add(const Register* planes, const std::int8_t* x) {
        Register found[2];
        choose<1>(planes[0], planes[1], found[1], found[0]);
        found[0] = ordered(found[0], kNeighboursSwapped);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            const __m512i codes = four(x + 4 * quad);
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int place = 2 * half + quad / 2;
                const auto mask = static_cast<std::uint8_t>(3 << 2 * place);
                add_products(sum[place], (found[quad % 2] & Register::fill(mask)).bits, codes);
            }
        }
    }
    __m512i total(int half) const {
        const __m512i* s = sum + 2 * half;
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(s[0], 2), s[1]);
        return _mm512_add_epi32(_mm512_slli_epi32(both, half == 0 ? 4 : 0), correction);
    }
};

// Nibbles: sums of whole bytes, which begin with the correction, and of their low nibbles.
template <int bits>
    requires(bits == 3 || bits == 4)
struct LineSums<bits> {
    __m512i whole[2], low[2], correction;
    void begin(std::int32_t from) {
        correction = whole[0] = _mm512_set1_epi32(from);
        whole[1] = low[0] = low[1] = _mm512_setzero_si512();
    }
    void add(const Register* planes, const std::int8_t* x) {
        Register quads[4];
        chosen_nibbles<bits>(planes, quads);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            if (bits < 4 || quad < 3) quads[quad] = ordered(quads[quad], kNibbleOrders<bits>.of[quad]);
            const __m512i codes = four(x + 4 * quad);
            add_products(whole[quad % 2], quads[quad].bits, codes);
            add_products(low[quad % 2], (quads[quad] & Register::fill(0x0f)).bits, codes);
        }
    }
    __m512i total(int half) const {
        const __m512i lows = _mm512_add_epi32(low[0], low[1]);
        if (half == 0) return _mm512_add_epi32(_mm512_slli_epi32(lows, 4), correction);
        return _mm512_sub_epi32(_mm512_add_epi32(whole[0], whole[1]), lows);
    }
};

// Bytes, of several rows of activations, which share the codes.
template <int bits, int rows>
struct RowsSums {
    __m512i sum[rows][2];
    void begin(const std::int32_t* corrections) {
        PLYWEIGHT_UNROLL
        for (int row = 0; row < rows; ++row) {
            sum[row][0] = sum[row][1] = _mm512_set1_epi32(corrections[row]);
        }
    }
    void add(const Register* planes, const std::int8_t* x) {
        Register halves[2][4];
        codes<bits>(planes, halves);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                const __m512i some = four(x + (quad * rows + row) * 4);
                PLYWEIGHT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    add_products(sum[row][half], halves[half][quad].bits, some);
                }
            }
        }
    }
    __m512i total(int row, int half) const { return sum[row][half]; }
};

// One row and codes that are not brought to bytes.
template <int bits>
    requires(bits <= 4)
struct RowsSums<bits, 1> : LineSums<bits> {
    void begin(const std::int32_t* corrections) { LineSums<bits>::begin(*corrections); }
    __m512i total(int, int half) const { return LineSums<bits>::total(half); }
};

}  // namespace
}  // namespace plyweight::avx512
