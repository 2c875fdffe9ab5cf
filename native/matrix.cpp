#include "matrix.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace plyweight {
namespace {

// From this size on, pages of its own. (A heap might keep what is freed.)
constexpr std::size_t kMappedBytes = std::size_t{1} << 16;
// So far apart do planes begin in a page: eight of them are spread over its 64 lines.
constexpr std::size_t kStaggerBytes = 9 * kLineBytes;
#if defined(__linux__)
constexpr std::size_t kHugePage = std::size_t{1} << 21;
#endif

constexpr const char* kNoMore = "8 planes are held; a code has no more bits";

// Written out, so that the byte order of the machine does not matter; compilers make it one move.
std::uint64_t eight(const std::uint8_t* bytes) {
    std::uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= std::uint64_t{bytes[i]} << 8 * i;
    return word;
}

// 64 bits from bit `place` on of memory with `bytes` bytes; zeros beyond its end.
std::uint64_t bits_at(const std::uint8_t* memory, std::size_t bytes, std::size_t place) {
    const std::size_t first = place / 8, shift = place % 8;
    std::uint8_t end[9] = {};
    const std::uint8_t* from = memory + first;
    if (bytes - first < 9) {
        std::memcpy(end, from, bytes - first);
        from = end;
    }
    const std::uint64_t word = eight(from);
    return shift == 0 ? word : word >> shift | std::uint64_t{from[8]} << (64 - shift);
}

std::uint64_t lowest(std::uint64_t word, std::size_t count) {
    return count < 64 ? word & ((std::uint64_t{1} << count) - 1) : word;
}

// Each 16 bits are a matrix of 4 x 4; its transpose. It is its own inverse.
std::uint64_t transposed(std::uint64_t x) {
    std::uint64_t t = (x ^ x >> 3) & 0x0a0a0a0a0a0a0a0aULL;
    x ^= t ^ t << 3;
    t = (x ^ x >> 6) & 0x00cc00cc00cc00ccULL;
    return x ^ t ^ t << 6;
}

// Four nibbles into the low halves of four bytes, and back.
std::uint32_t spread(std::uint32_t nibbles) {
    nibbles = (nibbles | nibbles << 8) & 0x00ff00ffU;
    return (nibbles | nibbles << 4) & 0x0f0f0f0fU;
}
std::uint32_t gathered(std::uint32_t bytes) {
    bytes &= 0x0f0f0f0fU;
    bytes = (bytes | bytes >> 4) & 0x00ff00ffU;
    return (bytes | bytes >> 8) & 0xffffU;
}

// The bits of bytes in the order of a plane (layout.hpp): bit j to j ^ plane. It is its own inverse.
std::uint32_t ordered(std::uint32_t x, int plane) {
    if (plane & 1) x = (x & 0x55555555U) << 1 | (x >> 1 & 0x55555555U);
    if (plane & 2) x = (x & 0x33333333U) << 2 | (x >> 2 & 0x33333333U);
    if (plane & 4) x = (x & 0x0f0f0f0fU) << 4 | (x >> 4 & 0x0f0f0f0fU);
    return x;
}

void store(std::uint8_t* bytes, std::uint32_t word) {
    for (int i = 0; i < 4; ++i) bytes[i] = static_cast<std::uint8_t>(word >> 8 * i);
}
std::uint32_t load(const std::uint8_t* bytes) {
    std::uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= std::uint32_t{bytes[i]} << 8 * i;
    return word;
}

// Calls `visit(first input, inputs, first block)` for every run of at most 64 inputs, 4 blocks.
template <class Visit>
void for_each_run(const PlaneMatrix& matrix, Visit visit) {
    for (std::size_t group = 0; group < matrix.num_groups(); ++group) {
        const std::size_t begin = group * matrix.group_size();
        const std::size_t inputs = std::min(matrix.group_size(), matrix.in() - begin);
        for (std::size_t done = 0; done < inputs; done += 64) {
            visit(begin + done, std::min<std::size_t>(64, inputs - done),
                  group * matrix.group_blocks() + done / kBlockInputs);
        }
    }
}

}  // namespace

Lines::Lines(std::size_t bytes, [[maybe_unused]] int index) : data_(nullptr), bytes_(bytes) {
#if defined(__linux__)
    if (bytes >= kMappedBytes) {
        const std::size_t begin = static_cast<std::size_t>(index) * kStaggerBytes;
        const std::size_t used = begin + bytes;
        // Linux lets a mapping begin with a huge page where its length is a multiple of one; of the
        // last one it must not make one that is not used up.
        const std::size_t huge = used / kHugePage * kHugePage;
        mapped_ = huge == 0 || huge == used ? used : huge + kHugePage;
        void* pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) throw std::bad_alloc();
        auto* first = static_cast<std::uint8_t*>(pages);
        // Fewer misses of the TLB. Hints, which may be ignored.
        if (huge > 0) madvise(first, huge, MADV_HUGEPAGE);
        if (huge > 0 && huge < mapped_) madvise(first + huge, mapped_ - huge, MADV_NOHUGEPAGE);
        pages_ = pages;
        data_ = first + begin;
        return;
    }
#endif
    data_ = static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{kLineBytes}));
    std::memset(data_, 0, bytes);
}

Lines::~Lines() {
    if (data_ == nullptr) return;
#if defined(__linux__)
    if (pages_ != nullptr) {
        munmap(pages_, mapped_);
        return;
    }
#endif
    ::operator delete(data_, std::align_val_t{kLineBytes});
}

PlaneMatrix::PlaneMatrix(std::size_t out, std::size_t in, std::size_t group_size)
    : out_(out), in_(in), group_size_(group_size == 0 ? in : std::min(group_size, in)) {}

std::size_t PlaneMatrix::row_blocks() const {
    const std::size_t last = in_ - (num_groups() - 1) * group_size_;
    return (num_groups() - 1) * group_blocks() + (last + kBlockInputs - 1) / kBlockInputs;
}

int PlaneMatrix::num_planes() const {
    const std::lock_guard<std::mutex> lock(access_);
    return num_planes_;
}

std::size_t PlaneMatrix::nbytes() const {
    return static_cast<std::size_t>(num_planes()) * plane_bytes();
}

HeldPlanes PlaneMatrix::planes(int count) const {
    const std::lock_guard<std::mutex> lock(access_);
    if (count > num_planes_) {
        throw std::invalid_argument(std::to_string(count) + " planes were asked for; " +
                                    std::to_string(num_planes_) + " are held");
    }
    HeldPlanes held;
    std::copy_n(planes_.begin(), count, held.begin());
    return held;
}

void PlaneMatrix::drop_plane() {
    const std::lock_guard<std::mutex> change(changing_);
    const std::lock_guard<std::mutex> lock(access_);
    if (num_planes_ == 0) throw std::invalid_argument("there is no plane to drop");
    planes_[static_cast<std::size_t>(--num_planes_)].reset();
}

void PlaneMatrix::add_plane(const std::uint8_t* wire) {
    const std::lock_guard<std::mutex> change(changing_);
    const int index = num_planes();
    if (index == kMaxBits) throw std::invalid_argument(kNoMore);
    add(ready_plane(wire, index));
}

void PlaneMatrix::add_plane(const ReadyPlane& plane) {
    const std::lock_guard<std::mutex> change(changing_);
    add(plane);
}

void PlaneMatrix::add(const ReadyPlane& plane) {
    const std::lock_guard<std::mutex> lock(access_);
    if (num_planes_ != plane.index) {
        throw std::invalid_argument("the plane was made ready as number " +
                                    std::to_string(plane.index) + "; the next one is " +
                                    std::to_string(num_planes_));
    }
    if (plane.signs != planes_[0]) {
        throw std::invalid_argument("the plane was made ready for a matrix of other signs");
    }
    planes_[static_cast<std::size_t>(num_planes_++)] = plane.lines;
}

ReadyPlane PlaneMatrix::ready_plane(const std::uint8_t* wire, int index) const {
    const auto signs = index == 0 ? nullptr : planes(1)[0];
    const auto plane = std::make_shared<const Lines>(plane_bytes(), index);
    const std::size_t blocks = row_blocks();
    for (std::size_t tile = 0; tile < num_tiles(); ++tile) {
        const std::size_t rows = std::min(kTileRows, out_ - tile * kTileRows);
        for_each_run(*this, [&](std::size_t input, std::size_t inputs, std::size_t block) {
            std::uint64_t nibbles[kTileRows] = {};
            for (std::size_t row = 0; row < rows; ++row) {
                const std::size_t place = (tile * kTileRows + row) * in_ + input;
                nibbles[row] = transposed(lowest(bits_at(wire, wire_bytes(), place), inputs));
            }
            std::uint8_t* line = plane->data() + (tile * blocks + block) * kLineBytes;
            for (std::size_t i = 0; 16 * i < inputs; ++i, line += kLineBytes) {
                for (std::size_t l = 0; l < 16; ++l) {
                    const auto low = static_cast<std::uint32_t>(nibbles[l] >> 16 * i & 0xffff);
                    const auto high = static_cast<std::uint32_t>(nibbles[16 + l] >> 16 * i & 0xffff);
                    store(line + 4 * l, spread(low) | spread(high) << 4);
                }
            }
        });
    }
    // The sign is held inverted, and magnitude bits xor the sign. (Signs are plane 0, whose order is
    // that of the items.)
    const std::uint8_t* positive = signs == nullptr ? nullptr : signs->data();
    for (std::size_t i = 0; i < plane->bytes(); ++i) {
        const int flip = positive == nullptr ? 0xff : ~positive[i];
        const auto bits = static_cast<std::uint8_t>(plane->data()[i] ^ flip);
        plane->data()[i] = static_cast<std::uint8_t>(ordered(bits, index));
    }
    return {index, plane, signs};
}

void PlaneMatrix::copy_plane(int index, std::uint8_t* wire) const {
    const HeldPlanes held = planes(index + 1);
    const std::uint8_t* positive = held[0]->data();
    const std::uint8_t* lines = held[static_cast<std::size_t>(index)]->data();
    const std::size_t blocks = row_blocks();
    std::memset(wire, 0, wire_bytes());
    for (std::size_t tile = 0; tile < num_tiles(); ++tile) {
        const std::size_t rows = std::min(kTileRows, out_ - tile * kTileRows);
        for_each_run(*this, [&](std::size_t input, std::size_t inputs, std::size_t block) {
            std::uint64_t nibbles[kTileRows] = {};
            for (std::size_t i = 0; 16 * i < inputs; ++i) {
                for (std::size_t l = 0; l < 16; ++l) {
                    const std::size_t at = (tile * blocks + block + i) * kLineBytes + 4 * l;
                    const std::uint32_t flip = index == 0 ? 0 : load(positive + at);
                    const std::uint32_t bits = ~(ordered(load(lines + at), index) ^ flip);
                    nibbles[l] |= std::uint64_t{gathered(bits)} << 16 * i;
                    nibbles[16 + l] |= std::uint64_t{gathered(bits >> 4)} << 16 * i;
                }
            }
            for (std::size_t row = 0; row < rows; ++row) {
                const std::size_t place = (tile * kTileRows + row) * in_ + input;
                const std::uint64_t bits = lowest(transposed(nibbles[row]), inputs);
                const std::size_t first = place / 8, shift = place % 8;
                for (std::size_t i = 0; 8 * i < inputs + shift; ++i) {
                    const std::uint64_t part = i == 0 ? bits << shift : bits >> (8 * i - shift);
                    wire[first + i] = static_cast<std::uint8_t>(wire[first + i] | (part & 0xff));
                }
            }
        });
    }
}

// A line of every row at a time, so that what is written stays in the first cache meanwhile.
TiledScales PlaneMatrix::tiled(const float* scale) const {
    const std::size_t bytes = num_tiles() * num_groups() * kTileRows * sizeof(float);
    const auto lines = std::make_shared<const Lines>(bytes);
    auto* to = reinterpret_cast<float*>(lines->data());
    const std::size_t groups = num_groups();
    constexpr std::size_t kRun = kLineBytes / sizeof(float);
    for (std::size_t tile = 0; tile < num_tiles(); ++tile, to += groups * kTileRows) {
        const float* from = scale + tile * kTileRows * groups;
        const std::size_t rows = std::min(kTileRows, out_ - tile * kTileRows);
        for (std::size_t begin = 0; begin < groups; begin += kRun) {
            const std::size_t end = std::min(begin + kRun, groups);
            for (std::size_t row = 0; row < rows; ++row) {
                for (std::size_t group = begin; group < end; ++group) {
                    to[group * kTileRows + row] = from[row * groups + group];
                }
            }
        }
    }
    return {out_, groups, lines};
}

}  // namespace plyweight
