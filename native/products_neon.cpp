// A quarter of a line of a plane at a time, in one register.
//
// Two ways to sum products of bytes: SDOT where the processor has it, else widening multiplications.
// SDOT is compiled for its functions alone, and they are called after a look at the processor.

#include <arm_neon.h>

#include "cpu.hpp"
#include "products_tiles.hpp"

#if defined(__clang__)
#define PLYWEIGHT_DOTPROD __attribute__((target("dotprod")))
#else
#define PLYWEIGHT_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

namespace plyweight::neon {
namespace {

struct Register {
    static constexpr std::size_t kBytes = 16;
    uint8x16_t bits;

    static Register fill(std::uint8_t byte) { return {vdupq_n_u8(byte)}; }
    static Register load(const std::uint8_t* from) { return {vld1q_u8(from)}; }
    void store(std::uint8_t* to) const { vst1q_u8(to, bits); }
    friend Register operator&(Register a, Register b) { return {vandq_u8(a.bits, b.bits)}; }
    friend Register operator^(Register a, Register b) { return {veorq_u8(a.bits, b.bits)}; }
    friend Register operator<<(Register a, int n) {
        return {vshlq_u8(a.bits, vdupq_n_s8(static_cast<std::int8_t>(n)))};
    }
    friend Register operator>>(Register a, int n) {
        return {vshlq_u8(a.bits, vdupq_n_s8(static_cast<std::int8_t>(-n)))};
    }
    static Register select(Register mask, Register a, Register b) {
        return {vbslq_u8(mask.bits, a.bits, b.bits)};
    }
    static Register add_negative(Register bytes) {
        return {vsraq_n_u8(bytes.bits, vmvnq_u8(bytes.bits), 7)};
    }
};

inline int8x16_t four(const std::int8_t* x) {
    std::int32_t word;
    __builtin_memcpy(&word, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// Sums of four neighbouring products, each at most 127 * 127: two of them fit 16 bits.
struct Widening {
    static int32x4_t add(int32x4_t sum, int8x16_t a, int8x16_t b) {
        const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
        const int16x8_t high = vmull_high_s8(a, b);
        return vpadalq_s16(sum, vpaddq_s16(low, high));
    }
};

struct Common {
    using Bits = Register;

    // Four rows of the weight at a time.
    template <int rows>
    static void float_dot(const std::uint8_t* w, std::size_t quads, const float* x, float* sums,
                          bool first) {
        for (std::size_t part = 0; part < 8; ++part) {
            float32x4_t sum[rows];
            const auto at = [&](int row) {
                return sums + static_cast<std::size_t>(row) * kTileRows + part * 4;
            };
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                sum[row] = first ? vdupq_n_f32(0.0f) : vld1q_f32(at(row));
            }
            const float* value = x;
            for (std::size_t quad = 0; quad < quads; ++quad) {
                const int32x4_t words =
                    vreinterpretq_s32_u8(vld1q_u8(w + quad * 2 * kLineBytes + part * 16));
                PLYWEIGHT_UNROLL
                for (int q = 0; q < 4; ++q, value += rows) {
                    const int32x4_t top = vshlq_s32(words, vdupq_n_s32(24 - 8 * q));
                    const float32x4_t level = vcvtq_f32_s32(vshrq_n_s32(top, 24));
                    PLYWEIGHT_UNROLL
                    for (int row = 0; row < rows; ++row) {
                        sum[row] = vfmaq_n_f32(sum[row], level, value[row]);
                    }
                }
            }
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) vst1q_f32(at(row), sum[row]);
        }
    }
};

struct WideningIsa : Common {
    template <int rows>
    static void dot(const std::uint8_t* w, std::size_t quads, const std::int8_t* x,
                    std::int32_t* sums, bool first) {
        for (std::size_t part = 0; part < 8; ++part) {
            int32x4_t sum[rows];
            const auto at = [&](int row) {
                return sums + static_cast<std::size_t>(row) * kTileRows + part * 4;
            };
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                sum[row] = first ? vdupq_n_s32(0) : vld1q_s32(at(row));
            }
            for (std::size_t quad = 0; quad < quads; ++quad) {
                const int8x16_t level =
                    vreinterpretq_s8_u8(vld1q_u8(w + quad * 2 * kLineBytes + part * 16));
                PLYWEIGHT_UNROLL
                for (int row = 0; row < rows; ++row) {
                    const std::int8_t* code = x + (quad * rows + static_cast<std::size_t>(row)) * 4;
                    sum[row] = Widening::add(sum[row], level, four(code));
                }
            }
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) vst1q_s32(at(row), sum[row]);
        }
    }
};

struct DotIsa : Common {
    template <int rows>
    PLYWEIGHT_DOTPROD static void dot(const std::uint8_t* w, std::size_t quads,
                                      const std::int8_t* x, std::int32_t* sums, bool first) {
        // Eight rows of the weight at a time: a sum waits for the one before it.
        for (std::size_t part = 0; part < 8; part += 2) {
            int32x4_t sum[rows][2];
            const auto at = [&](int row, std::size_t i) {
                return sums + static_cast<std::size_t>(row) * kTileRows + (part + i) * 4;
            };
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                PLYWEIGHT_UNROLL
                for (std::size_t i = 0; i < 2; ++i) {
                    sum[row][i] = first ? vdupq_n_s32(0) : vld1q_s32(at(row, i));
                }
            }
            for (std::size_t quad = 0; quad < quads; ++quad) {
                const std::uint8_t* from = w + quad * 2 * kLineBytes + part * 16;
                const int8x16_t level[2] = {vreinterpretq_s8_u8(vld1q_u8(from)),
                                            vreinterpretq_s8_u8(vld1q_u8(from + 16))};
                PLYWEIGHT_UNROLL
                for (int row = 0; row < rows; ++row) {
                    std::int32_t word;
                    __builtin_memcpy(&word, x + (quad * rows + static_cast<std::size_t>(row)) * 4, 4);
                    const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(word));
                    sum[row][0] = vdotq_s32(sum[row][0], level[0], codes);
                    sum[row][1] = vdotq_s32(sum[row][1], level[1], codes);
                }
            }
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                PLYWEIGHT_UNROLL
                for (std::size_t i = 0; i < 2; ++i) vst1q_s32(at(row, i), sum[row][i]);
            }
        }
    }
};

}  // namespace

PLYWEIGHT_DEFINE_PRODUCTS(Common)

void pack_int8(const ProductJob& job, const float* x, std::size_t row_block, std::int8_t* codes,
               float* code_scales, std::int32_t*) {
    pack_int8_rows(job, x, row_block, codes, code_scales);
}

void int8_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch) {
    static const bool has_dot_products = cpu_has("dotprod");
    if (has_dot_products) int8_tiles_of<DotIsa>(job, begin, end, scratch);
    else int8_tiles_of<WideningIsa>(job, begin, end, scratch);
}

}  // namespace plyweight::neon
