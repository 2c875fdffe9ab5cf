// A weight (out, in) as bit planes in the compute layout (layout.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layout.hpp"

namespace plyweight {

// Zeroed memory for a plane, aligned to a line; large ones in pages of their own, which go back to
// the system when they are freed.
class Lines {
public:
    explicit Lines(std::size_t bytes);
    ~Lines();
    Lines(Lines&& other) noexcept;
    Lines& operator=(Lines&&) = delete;

    std::uint8_t* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

private:
    std::uint8_t* data_;
    std::size_t bytes_;
};

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

    std::size_t num_planes() const { return planes_.size(); }
    std::size_t nbytes() const;
    const std::uint8_t* plane_data(std::size_t index) const { return planes_[index].data(); }

    // The next plane, in the wire layout: (out * in + 7) / 8 bytes.
    void add_plane(const std::uint8_t* wire);
    void drop_plane() { planes_.pop_back(); }
    // Plane `index` in the wire layout again, byte for byte.
    void copy_plane(std::size_t index, std::uint8_t* wire) const;

private:
    std::size_t out_, in_, group_size_;
    std::vector<Lines> planes_;
};

}  // namespace plyweight
