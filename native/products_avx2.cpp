// Half a line of a plane at a time, in one register.

#include <immintrin.h>

#include "products_tiles.hpp"

namespace plyweight::avx2 {
namespace {

struct Register {
    static constexpr std::size_t kBytes = 32;
    __m256i bits;

    static Register fill(std::uint8_t byte) { return {_mm256_set1_epi8(static_cast<char>(byte))}; }
    static Register load(const std::uint8_t* from) {
        return {_mm256_load_si256(reinterpret_cast<const __m256i*>(from))};
    }
    void store(std::uint8_t* to) const {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), bits);
    }
    friend Register operator&(Register a, Register b) { return {_mm256_and_si256(a.bits, b.bits)}; }
    friend Register operator^(Register a, Register b) { return {_mm256_xor_si256(a.bits, b.bits)}; }
    friend Register operator<<(Register a, int n) { return {_mm256_slli_epi16(a.bits, n)}; }
    friend Register operator>>(Register a, int n) { return {_mm256_srli_epi16(a.bits, n)}; }
    static Register select(Register mask, Register a, Register b) {
        return {_mm256_or_si256(_mm256_and_si256(mask.bits, a.bits),
                                _mm256_andnot_si256(mask.bits, b.bits))};
    }
    static Register add_negative(Register bytes) {
        const __m256i negative = _mm256_cmpgt_epi8(bytes.bits, _mm256_set1_epi8(-1));  // 0xff, or -1
        return {_mm256_sub_epi8(bytes.bits, negative)};
    }
};

struct Isa {
    using Bits = Register;

    // Eight rows of the weight at a time. Bytes are multiplied as magnitude of the level times code
    // with the level's sign: sums of two products, at most 2 * 127 * 127, fit 16 bits.
    template <int rows>
    static void dot(const std::uint8_t* w, std::size_t quads, const std::int8_t* x,
                    std::int32_t* sums, bool first) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (std::size_t part = 0; part < 4; ++part) {
            __m256i sum[rows];
            const auto at = [&](int row) {
                return reinterpret_cast<__m256i*>(sums + row * 32) + part;
            };
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                sum[row] = first ? _mm256_setzero_si256() : _mm256_loadu_si256(at(row));
            }
            for (std::size_t quad = 0; quad < quads; ++quad) {
                const __m256i level = _mm256_load_si256(
                    reinterpret_cast<const __m256i*>(w + quad * 2 * kLineBytes) + part);
                const __m256i magnitude = _mm256_abs_epi8(level);
                PLYWEIGHT_UNROLL
                for (int row = 0; row < rows; ++row) {
                    int four;
                    __builtin_memcpy(&four, x + (quad * rows + static_cast<std::size_t>(row)) * 4, 4);
                    const __m256i code = _mm256_sign_epi8(_mm256_set1_epi32(four), level);
                    const __m256i twos = _mm256_maddubs_epi16(magnitude, code);
                    sum[row] = _mm256_add_epi32(sum[row], _mm256_madd_epi16(twos, ones));
                }
            }
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) _mm256_storeu_si256(at(row), sum[row]);
        }
    }

    template <int rows>
    static void float_dot(const std::uint8_t* w, std::size_t quads, const float* x, float* sums,
                          bool first) {
        for (std::size_t part = 0; part < 4; ++part) {
            float_rows<rows, 0>(w, quads, x, sums, first, part);
            if constexpr (rows > 4) float_rows<rows, 4>(w, quads, x, sums, first, part);
        }
    }

    // Rows `begin` and up to three more. Even and odd inputs have sums of their own, for a sum waits
    // for the one before it; that is so for any number of rows, which would differ else.
    template <int rows, int begin>
    static void float_rows(const std::uint8_t* w, std::size_t quads, const float* x, float* sums,
                           bool first, std::size_t part) {
        constexpr int count = rows - begin < 4 ? rows - begin : 4;
        const auto at = [&](int row) {
            return sums + static_cast<std::size_t>(begin + row) * kTileRows + part * 8;
        };
        __m256 sum[2][count];
        PLYWEIGHT_UNROLL
        for (int row = 0; row < count; ++row) {
            sum[0][row] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(at(row));
            sum[1][row] = _mm256_setzero_ps();
        }
        for (std::size_t quad = 0; quad < quads; ++quad) {
            const __m256i words = _mm256_load_si256(
                reinterpret_cast<const __m256i*>(w + quad * 2 * kLineBytes) + part);
            PLYWEIGHT_UNROLL
            for (int q = 0; q < 4; ++q, x += rows) {
                const __m256i top = _mm256_slli_epi32(words, 24 - 8 * q);
                const __m256 level = _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
                PLYWEIGHT_UNROLL
                for (int row = 0; row < count; ++row) {
                    __m256& to = sum[q % 2][row];
                    to = _mm256_fmadd_ps(level, _mm256_set1_ps(x[begin + row]), to);
                }
            }
        }
        PLYWEIGHT_UNROLL
        for (int row = 0; row < count; ++row) {
            _mm256_storeu_ps(at(row), _mm256_add_ps(sum[0][row], sum[1][row]));
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

}  // namespace plyweight::avx2
