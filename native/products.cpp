#include "products.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "pool.hpp"
#include "product_job.hpp"

namespace plyweight {
namespace {

struct Functions {
    decltype(&portable::pack_int8) pack_int8;
    decltype(&portable::pack_float) pack_float;
    decltype(&portable::int8_tiles) int8_tiles;
    decltype(&portable::float_tiles) float_tiles;
    decltype(&portable::tile_levels) tile_levels;
};

#define PLYWEIGHT_FUNCTIONS(name) \
    Functions{name::pack_int8, name::pack_float, name::int8_tiles, name::float_tiles, name::tile_levels}

Functions functions_of(Variant variant) {
    switch (variant) {
#ifdef PLYWEIGHT_HAS_AVX2
        case Variant::avx2:
            return PLYWEIGHT_FUNCTIONS(avx2);
#endif
#ifdef PLYWEIGHT_HAS_AVX512
        case Variant::avx512:
            return PLYWEIGHT_FUNCTIONS(avx512);
#endif
#ifdef PLYWEIGHT_HAS_NEON
        case Variant::neon:
            return PLYWEIGHT_FUNCTIONS(neon);
#endif
        default:
            return PLYWEIGHT_FUNCTIONS(portable);
    }
}

// Products of fewer weights and rows are over before a second thread has begun.
constexpr std::size_t kParallelTerms = std::size_t{1} << 17;
constexpr std::size_t kParallelInputs = std::size_t{1} << 16;  // to pack

// Memory that a thread keeps for its next product: fresh pages would cost more than small products.
// Of what a product needs, more than this is given back.
constexpr std::size_t kKeptBytes = std::size_t{1} << 22;

class Memory {
public:
    // Takes `count` of T, aligned to a line.
    template <class T>
    T* take(std::size_t count) {
        const std::size_t begin = used_;
        used_ += (count * sizeof(T) + kLineBytes - 1) / kLineBytes * kLineBytes;
        return data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + begin);
    }
    // Runs `plan` once to learn how much it takes and once to give it that.
    template <class Plan>
    void lay_out(Plan plan) {
        data_ = nullptr;
        used_ = 0;
        plan();
        if (used_ > kept_.size) kept_ = Block(used_);
        data_ = kept_.data;
        used_ = 0;
        plan();
    }
    void release_large() {
        if (kept_.size > kKeptBytes) kept_ = Block();
    }

private:
    struct Block {
        Block() = default;
        explicit Block(std::size_t bytes)
            : data(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{kLineBytes}))),
              size(bytes) {}
        ~Block() { ::operator delete(data, std::align_val_t{kLineBytes}); }
        Block& operator=(Block&& other) noexcept {
            std::swap(data, other.data);
            std::swap(size, other.size);
            return *this;
        }
        std::uint8_t* data = nullptr;
        std::size_t size = 0;
    };
    Block kept_;
    std::uint8_t* data_ = nullptr;
    std::size_t used_ = 0;
};

thread_local Memory memory;

template <class Body>
class WorkOf final : public Work {
public:
    explicit WorkOf(Body body) : body_(body) {}
    void run(std::size_t begin, std::size_t end, int slot) noexcept override {
        body_(begin, end, slot);
    }

private:
    Body body_;
};

template <class Body>
void parallel(std::size_t num_units, int num_threads, Body body) {
    WorkOf<Body> work(body);
    run_parallel(work, num_units, num_threads);
}

ProductJob job_of(const PlaneMatrix& matrix, const HeldPlanes& planes, int bits) {
    ProductJob job{};
    for (std::size_t i = 0; i < static_cast<std::size_t>(bits); ++i) job.planes[i] = planes[i]->data();
    job.bits = bits;
    job.out = matrix.out();
    job.in = matrix.in();
    job.group_size = matrix.group_size();
    job.num_groups = matrix.num_groups();
    job.group_blocks = matrix.group_blocks();
    job.row_blocks = matrix.row_blocks();
    return job;
}

}  // namespace

void product(const PlaneMatrix& matrix, const float* x, std::size_t m, const TiledScales& scales,
             float gain, int bits, Mode mode, Variant variant, int num_threads, float* y) {
    if (m == 0) return;
    const Functions functions = functions_of(variant);
    const HeldPlanes planes = matrix.planes(bits);
    ProductJob job = job_of(matrix, planes, bits);
    job.scales = scales.data();
    job.gain = gain;
    job.m = m;
    job.y = y;
    job.num_row_blocks = (m + kBlockRows - 1) / kBlockRows;
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    if (m * job.in * job.out < kParallelTerms) num_threads = 1;
    num_threads = static_cast<int>(
        std::min(static_cast<std::size_t>(num_threads), matrix.num_tiles()));
    const std::size_t scratch = (2 * kSlabRows + (gain == 1.0f ? 0 : job.num_groups)) * kTileRows;

    std::int8_t* codes = nullptr;
    float *floats = nullptr, *code_scales = nullptr, *scratches = nullptr;
    std::int32_t* corrections = nullptr;
    memory.lay_out([&] {
        if (mode == Mode::int8) {
            codes = memory.take<std::int8_t>(m * inputs);
            code_scales = memory.take<float>(m * job.num_groups);
            corrections = memory.take<std::int32_t>(m * job.num_groups);
        } else {
            floats = memory.take<float>(m * inputs);
        }
        scratches = memory.take<float>(scratch * static_cast<std::size_t>(num_threads));
    });
    job.codes = codes;
    job.floats = floats;
    job.code_scales = code_scales;
    job.corrections = corrections;

    parallel(job.num_row_blocks, m * job.in < kParallelInputs ? 1 : num_threads,
             [&](std::size_t begin, std::size_t end, int) {
                 for (std::size_t i = begin; i < end; ++i) {
                     if (mode == Mode::floating) functions.pack_float(job, x, i, floats);
                     else functions.pack_int8(job, x, i, codes, code_scales, corrections);
                 }
             });
    parallel(matrix.num_tiles(), num_threads, [&](std::size_t begin, std::size_t end, int slot) {
        float* own = scratches + scratch * static_cast<std::size_t>(slot);
        if (mode == Mode::int8) functions.int8_tiles(job, begin, end, own);
        else functions.float_tiles(job, begin, end, own);
    });
    memory.release_large();
}

void levels(const PlaneMatrix& matrix, int bits, std::size_t begin, std::size_t end, Variant variant,
            int num_threads, std::int8_t* out) {
    if (begin == end) return;
    const Functions functions = functions_of(variant);
    const HeldPlanes planes = matrix.planes(bits);
    const ProductJob job = job_of(matrix, planes, bits);
    const std::size_t inputs = job.row_blocks * kBlockInputs;
    const std::size_t first_tile = begin / kTileRows;
    const std::size_t num_tiles = (end + kTileRows - 1) / kTileRows - first_tile;
    num_threads = static_cast<int>(std::min(static_cast<std::size_t>(num_threads), num_tiles));
    if (job.in * (end - begin) < kParallelTerms) num_threads = 1;
    std::int8_t* tiles = nullptr;
    memory.lay_out([&] {
        tiles = memory.take<std::int8_t>(kTileRows * inputs * static_cast<std::size_t>(num_threads));
    });
    parallel(num_tiles, num_threads, [&](std::size_t i, std::size_t last, int slot) {
        std::int8_t* rows = tiles + kTileRows * inputs * static_cast<std::size_t>(slot);
        for (; i < last; ++i) {
            const std::size_t tile = first_tile + i;
            functions.tile_levels(job, tile, rows);
            const std::size_t to = std::min((tile + 1) * kTileRows, end);
            for (std::size_t row = std::max(tile * kTileRows, begin); row < to; ++row) {
                const std::int8_t* from = rows + (row - tile * kTileRows) * inputs;
                for (std::size_t group = 0; group < job.num_groups; ++group) {
                    const std::size_t input = group * job.group_size;
                    std::memcpy(out + (row - begin) * job.in + input,
                                from + group * job.group_blocks * kBlockInputs,
                                std::min(job.group_size, job.in - input));
                }
            }
        }
    });
    memory.release_large();
}

}  // namespace plyweight
