// Activations (m, in) times the first planes of a matrix: what plyweight/kernels/reference.py defines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.hpp"
#include "matrix.hpp"

namespace plyweight {

enum class Mode { int8, floating };

// Both throw std::invalid_argument if fewer planes are held; other sizes are the caller's word.

// y (m, out) = x (m, in) times the weight at `bits`, whose scales are `scales` times `gain`. x and y in C
// order; `scales` are of this matrix. A row of the result depends on its row of x alone, and not on
// num_threads.
void product(const PlaneMatrix& matrix, const float* x, std::size_t m, const TiledScales& scales,
             float gain, int bits, Mode mode, Variant variant, int num_threads, float* y);

// The levels at `bits` of rows begin to end, (end - begin, in).
void levels(const PlaneMatrix& matrix, int bits, std::size_t begin, std::size_t end, Variant variant,
            int num_threads, std::int8_t* out);

}  // namespace plyweight
