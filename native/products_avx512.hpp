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
    friend Register operator<<(Register a, unsigned n) { return {_mm512_slli_epi16(a.bits, n)}; }
    friend Register operator>>(Register a, unsigned n) { return {_mm512_srli_epi16(a.bits, n)}; }
    // The instruction overwrites its first operand: `a`, which is often not needed any more, where the
    // mask would be copied every time.
    static Register select(Register mask, Register a, Register b) {
        return {_mm512_ternarylogic_epi32(a.bits, mask.bits, b.bits, 0xe2)};
    }
};

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

// Sums of one line of every plane with one row of activations, for each half of the rows. Where
// codes stay where they are in their bytes, a sum is of codes times a power of two; `total` brings
// all to codes at the top of bytes.
template <int bits>
struct LineSums;

// A bit of every byte is a code: sums of its eight places.
template <>
struct LineSums<1> {
    __m512i sum[8];
    void clear() {
        PLYWEIGHT_UNROLL
        for (__m512i& s : sum) s = _mm512_setzero_si512();
    }
    void add(Register* planes, const std::int8_t* x) {
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
        return _mm512_slli_epi32(_mm512_add_epi32(low, high), half == 0 ? 4 : 0);
    }
};

// Pairs of bits: sums of four places.
template <>
struct LineSums<2> {
    __m512i sum[4];
    void clear() {
        PLYWEIGHT_UNROLL
        for (__m512i& s : sum) s = _mm512_setzero_si512();
    }
    void add(Register* planes, const std::int8_t* x) {
        Register found[2];
        pairs(planes[0], planes[1], found[1], found[0]);
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
        return _mm512_slli_epi32(both, half == 0 ? 4 : 0);
    }
};

// Nibbles: sums of whole bytes and of their low nibbles.
template <int bits>
    requires(bits == 3 || bits == 4)
struct LineSums<bits> {
    __m512i whole[2], low[2];
    void clear() {
        whole[0] = whole[1] = low[0] = low[1] = _mm512_setzero_si512();
    }
    void add(Register* planes, const std::int8_t* x) {
        Register quads[4];
        nibbles<bits>(planes, quads);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            const __m512i codes = four(x + 4 * quad);
            add_products(whole[quad % 2], quads[quad].bits, codes);
            add_products(low[quad % 2], (quads[quad] & Register::fill(0x0f)).bits, codes);
        }
    }
    __m512i total(int half) const {
        const auto of = [](const __m512i* s) { return _mm512_add_epi32(s[0], s[1]); };
        return half == 0 ? _mm512_slli_epi32(of(low), 4) : _mm512_sub_epi32(of(whole), of(low));
    }
};

// Bytes. GCC 12 makes the loop of eight planes slower by a quarter where a half has one sum.
template <int bits>
    requires(bits > 4)
struct LineSums<bits> {
    static constexpr int kWays = bits == 8 ? 4 : 1;
    __m512i sum[2][kWays];
    void clear() {
        PLYWEIGHT_UNROLL
        for (auto& half : sum) {
            PLYWEIGHT_UNROLL
            for (__m512i& s : half) s = _mm512_setzero_si512();
        }
    }
    void add(Register* planes, const std::int8_t* x) {
        Register halves[2][4];
        codes<bits>(planes, halves);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            const __m512i some = four(x + 4 * quad);
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                add_products(sum[half][quad % kWays], halves[half][quad].bits, some);
            }
        }
    }
    __m512i total(int half) const {
        const __m512i* s = sum[half];
        if constexpr (kWays == 1) return s[0];
        else return _mm512_add_epi32(_mm512_add_epi32(s[0], s[1]), _mm512_add_epi32(s[2], s[3]));
    }
};

// The same for several rows of activations, which share the codes.
template <int bits, int rows>
struct RowsSums {
    static constexpr int kWays = rows == 2 ? 2 : 1;
    __m512i sum[rows][2][kWays];
    void clear() {
        PLYWEIGHT_UNROLL
        for (auto& row : sum) {
            PLYWEIGHT_UNROLL
            for (auto& half : row) {
                PLYWEIGHT_UNROLL
                for (__m512i& s : half) s = _mm512_setzero_si512();
            }
        }
    }
    void add(Register* planes, const std::int8_t* x) {
        Register halves[2][4];
        codes<bits>(planes, halves);
        PLYWEIGHT_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                const __m512i some = four(x + (quad * rows + row) * 4);
                PLYWEIGHT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    __m512i& to = sum[row][half][quad % kWays];
                    add_products(to, halves[half][quad].bits, some);
                }
            }
        }
    }
    __m512i total(int row, int half) const {
        return kWays == 1 ? sum[row][half][0]
                          : _mm512_add_epi32(sum[row][half][0], sum[row][half][kWays - 1]);
    }
};

template <int bits>
struct RowsSums<bits, 1> : LineSums<bits> {
    __m512i total(int, int half) const { return LineSums<bits>::total(half); }
};

}  // namespace
}  // namespace plyweight::avx512
