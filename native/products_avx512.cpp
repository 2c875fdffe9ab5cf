// A line of a plane at a time, in one register.
//
// For up to four rows of activations a tile is multiplied while it is being decoded; for more, bytes
// are decoded to the first cache and used for all rows (products_avx512_many.hpp). Sums are of
// integers, so both ways give the same.

#include <immintrin.h>

#include "products_avx512.hpp"
#include "products_avx512_many.hpp"
#include "products_avx512_pack.hpp"
#include "products_tiles.hpp"

namespace plyweight::avx512 {
namespace {

// Up to so many rows a tile is multiplied while it is being decoded.
constexpr std::size_t kFusedRows = 4;

struct Isa {
    using Bits = Register;
    template <int rows>
    static void float_dot(const std::uint8_t* w, std::size_t quads, const float* x, float* sums,
                          bool first) {
        float_rows<rows, 0>(w, quads, x, sums, first);
        if constexpr (rows > 4) float_rows<rows, 4>(w, quads, x, sums, first);
    }

    // Rows `begin` and up to three more. Even and odd inputs have sums of their own, for a sum waits
    // for the one before it; that is so for any number of rows, which would differ else. Not inlined,
    // so that sums stay in registers.
    template <int rows, int begin>
    [[gnu::noinline]] static void float_rows(const std::uint8_t* w, std::size_t quads,
                                             const float* x, float* sums, bool first) {
        constexpr int count = rows - begin < 4 ? rows - begin : 4;
        __m512 sum[2][count][2];
        PLYWEIGHT_UNROLL
        for (int row = 0; row < count; ++row) {
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                sum[0][row][half] = first ? _mm512_setzero_ps()
                                          : _mm512_loadu_ps(sums + (begin + row) * 32 + half * 16);
                sum[1][row][half] = _mm512_setzero_ps();
            }
        }
        for (std::size_t quad = 0; quad < quads; ++quad, w += 2 * kLineBytes, x += 4 * rows) {
            const __m512i words[2] = {_mm512_load_si512(w), _mm512_load_si512(w + kLineBytes)};
            PLYWEIGHT_UNROLL
            for (int q = 0; q < 4; ++q) {
                __m512 level[2];
                PLYWEIGHT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const __m512i top =
                        _mm512_slli_epi32(words[half], static_cast<unsigned>(24 - 8 * q));
                    level[half] = _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
                }
                PLYWEIGHT_UNROLL
                for (int row = 0; row < count; ++row) {
                    const __m512 value = _mm512_set1_ps(x[q * rows + begin + row]);
                    PLYWEIGHT_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        __m512& to = sum[q % 2][row][half];
                        to = _mm512_fmadd_ps(level[half], value, to);
                    }
                }
            }
        }
        PLYWEIGHT_UNROLL
        for (int row = 0; row < count; ++row) {
            PLYWEIGHT_UNROLL
            for (int half = 0; half < 2; ++half) {
                _mm512_storeu_ps(sums + (begin + row) * 32 + half * 16,
                                 _mm512_add_ps(sum[0][row][half], sum[1][row][half]));
            }
        }
    }
};

// A tile times 1 to 4 rows. `scales` is (groups, 32). `blocks`, of a group, is 0 if it is not known
// when this is compiled, or not the same for all.
template <int bits, int rows, int blocks>
void fused_tile(const ProductJob& job, std::size_t tile, const float* scales) {
    const std::uint8_t* planes[bits];
    PLYWEIGHT_UNROLL
    for (int p = 0; p < bits; ++p) planes[p] = job.planes[p] + tile * job.row_blocks * kLineBytes;
    __m512 y[rows][2];
    PLYWEIGHT_UNROLL
    for (auto& row : y) row[0] = row[1] = _mm512_setzero_ps();
    const std::int8_t* x = job.codes;
    std::size_t line = 0;
    for (std::size_t group = 0; group < job.num_groups; ++group) {
        RowsSums<bits, rows> sums;
        sums.begin(job.corrections + group * rows);
        // Nothing is fetched ahead: processors follow eight streams by themselves, and better.
        const auto add_line = [&]() __attribute__((always_inline)) {
            Register held[bits];
            PLYWEIGHT_UNROLL
            for (int p = 0; p < bits; ++p) held[p] = Register::load(planes[p] + line * kLineBytes);
            sums.add(held, x);
            ++line;
            x += kBlockInputs * rows;
        };
        if constexpr (blocks == 0) {
            const std::size_t end = smaller((group + 1) * job.group_blocks, job.row_blocks);
            while (line < end) add_line();
        } else {
            PLYWEIGHT_UNROLL
            for (int i = 0; i < blocks; ++i) add_line();
        }
        PLYWEIGHT_UNROLL
        for (int half = 0; half < 2; ++half) {
            const std::size_t place = group * kTileRows + static_cast<std::size_t>(half) * 16;
            const __m512 scale = _mm512_load_ps(scales + place);
            PLYWEIGHT_UNROLL
            for (int row = 0; row < rows; ++row) {
                const std::size_t at = group * rows + static_cast<std::size_t>(row);
                const __m512 whole = _mm512_cvtepi32_ps(sums.total(row, half));
                const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(job.code_scales[at]), scale);
                y[row][half] = _mm512_add_ps(y[row][half], _mm512_mul_ps(whole, factor));
            }
        }
    }
    const std::size_t columns = smaller(kTileRows, job.out - tile * kTileRows);
    const auto valid = static_cast<std::uint32_t>((std::uint64_t{1} << columns) - 1);
    PLYWEIGHT_UNROLL
    for (std::size_t row = 0; row < rows; ++row) {
        float* to = job.y + row * job.out + tile * kTileRows;
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>(valid), y[row][0]);
        _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(valid >> 16), y[row][1]);
    }
}

template <int rows, int blocks = 0>
void fused(const ProductJob& job, std::size_t tile, const float* scales) {
    switch (job.bits) {
        case 1: return fused_tile<1, rows, blocks>(job, tile, scales);
        case 2: return fused_tile<2, rows, blocks>(job, tile, scales);
        case 3: return fused_tile<3, rows, blocks>(job, tile, scales);
        case 4: return fused_tile<4, rows, blocks>(job, tile, scales);
        case 5: return fused_tile<5, rows, blocks>(job, tile, scales);
        case 6: return fused_tile<6, rows, blocks>(job, tile, scales);
        case 7: return fused_tile<7, rows, blocks>(job, tile, scales);
        // GCC 12 runs out of registers where it decodes two lines of eight planes at once.
        default: return fused_tile<8, rows, 0>(job, tile, scales);
    }
}

}  // namespace

PLYWEIGHT_DEFINE_PRODUCTS(Isa)

void pack_int8(const ProductJob& job, const float* x, std::size_t row_block, std::int8_t* codes,
               float* code_scales, std::int32_t* corrections) {
    // Codes that are multiplied while they are decoded lack the half cell: see layout.hpp.
    const std::int32_t bias = job.m <= kFusedRows ? 128 - (1 << (8 - job.bits) >> 1) : 128;
    pack_biased_rows(job, x, row_block, codes, code_scales, corrections, bias);
}

void int8_tiles(const ProductJob& job, std::size_t begin, std::size_t end, float* scratch) {
    for (std::size_t tile = begin; tile < end; ++tile) {
        const float* scales = tile_scales(job, tile, scratch);
        switch (job.m) {
            case 1:
                // Groups of 32, whose ends come often.
                if (job.group_blocks == 2 && job.row_blocks % 2 == 0) fused<1, 2>(job, tile, scales);
                else fused<1>(job, tile, scales);
                break;
            case 2: fused<2>(job, tile, scales); break;
            case 3: fused<3>(job, tile, scales); break;
            case 4: fused<4>(job, tile, scales); break;
            default:
                many_rows(job, tile, scales, int8_sums_of(scratch), results_of(scratch));
        }
    }
}

}  // namespace plyweight::avx512
