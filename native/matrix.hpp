// A weight (out, in) as bit planes in the compute layout (layout.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <array>
#include <memory>
#include <mutex>

#include "layout.hpp"

namespace plyweight {

// Zeroed memory, aligned to a line; much of it in pages of its own, which go back to the system when it
// is freed. There, planes of different `index` begin at different places of a page: they are read side
// by side, and lines at the same place of a page would take each other's place in the first cache.
class Lines {
public:
    explicit Lines(std::size_t bytes, int index = 0);  // throws std::bad_alloc
    ~Lines();
    Lines(const Lines&) = delete;
    Lines& operator=(const Lines&) = delete;

    std::uint8_t* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

private:
    std::uint8_t* data_;
    std::size_t bytes_;
    void* pages_ = nullptr;
    std::size_t mapped_ = 0;
};

// The first planes of a matrix, for as long as who computes with them holds them.
using HeldPlanes = std::array<std::shared_ptr<const Lines>, kMaxBits>;

// A plane in the compute layout that no matrix holds yet. Its bits depend on its number and, but for the
// first one, on the signs of the matrix it is made for.
struct ReadyPlane {
    int index;
    std::shared_ptr<const Lines> lines, signs;
};

// Scales of a matrix in the compute layout: (tiles, groups, 32), zeros for rows that there are not.
struct TiledScales {
    std::size_t out, num_groups;
    std::shared_ptr<const Lines> lines;

    const float* data() const { return reinterpret_cast<const float*>(lines->data()); }
};

// May be used by several threads at once: what computes keeps the planes it began with.
class PlaneMatrix {
public:
    // group_size: inputs that share a scale; 0 for all.
    PlaneMatrix(std::size_t out, std::size_t in, std::size_t group_size);

    std::size_t out() const { return out_; }
    std::size_t in() const { return in_; }
    std::size_t group_size() const { return group_size_; }
    std::size_t num_groups() const { return (in_ + group_size_ - 1) / group_size_; }
    std::size_t group_blocks() const { return (group_size_ + kBlockInputs - 1) / kBlockInputs; }
    // Of a row, in blocks: those of the last group stop with the last input.
    std::size_t row_blocks() const;
    std::size_t num_tiles() const { return (out_ + kTileRows - 1) / kTileRows; }
    std::size_t wire_bytes() const { return (out_ * in_ + 7) / 8; }
    std::size_t plane_bytes() const { return num_tiles() * row_blocks() * kLineBytes; }

    int num_planes() const;
    std::size_t nbytes() const;

    // The next plane, in the wire layout: wire_bytes(). Throws std::invalid_argument at the ninth.
    void add_plane(const std::uint8_t* wire);
    // The same in two steps, of which the first takes long and changes nothing: the plane will have the
    // number `index`. add_plane throws std::invalid_argument if another one is next, or if the plane
    // was made for other signs; ready_plane for an index above 0 while no plane is held.
    ReadyPlane ready_plane(const std::uint8_t* wire, int index) const;
    void add_plane(const ReadyPlane& plane);
    // Throws std::invalid_argument if there is none.
    void drop_plane();
    // The first `count`. Throws std::invalid_argument if fewer are held.
    HeldPlanes planes(int count) const;
    // Plane `index` in the wire layout again, byte for byte.
    void copy_plane(int index, std::uint8_t* wire) const;

    // Scales (out, groups) in the compute layout.
    TiledScales tiled(const float* scale) const;

private:
    void add(const ReadyPlane& plane);  // by who holds changing_
    std::size_t out_, in_, group_size_;
    std::mutex changing_;        // held by who adds or drops, from the beginning to the end
    mutable std::mutex access_;  // held for as long as the two below are looked at
    HeldPlanes planes_;
    int num_planes_ = 0;
};

}  // namespace plyweight
