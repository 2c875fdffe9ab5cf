// The compute layout of bit planes, which all variants of the products share.
//
// **Offset codes.** A code is a sign and a magnitude; what is held of it is the unsigned number that
// grows with the level: plane 0 is the sign, inverted, and every later plane the magnitude bit xor
// the sign. With c the first b bits of it, put at the top of a byte, and h = 1 << (8 - b) >> 1
//
//     level = c + h - 128            below 8 bits
//     level = c + (c < 128) - 128    at 8 bits, where the half cell is none and both zeros are 0
//
// so a prefix of planes is still the whole code, nothing is negated on the way to a product, and
// sum(level x) = sum(c x) - (128 - h) sum(x).
//
// **Tiles.** Rows are taken 32 at a time, a tile, and of their inputs 16, a block: 512 weights, of
// which each plane has one cache line. A plane is its lines in order, tile by tile, and an allocation
// of its own: adding one leaves the others where they are, and dropping one gives back its memory.
//
//     byte 4 l + q of a line of plane p, bit (4 h + i) ^ p    is row 16 h + l, input 4 i + q of the block
//
// so a register of 16 x 32 bits is 16 rows, each with four neighbouring inputs: what a dot product
// of bytes takes, and no sum has to be gathered across a register. The eight bits of a byte are the
// two halves of the rows (high bits and low bits) and four quads of inputs.
//
// That each plane has them in an order of its own is so that eight planes become bytes by choosing bits
// alone, without moving any: the bits of item 4 h + i have eight different places in the eight planes,
// and of each place there is one plane that has it for this item. In the byte that has been chosen, bit k
// is of plane k ^ (4 h + i); one instruction puts the eight bits of a byte in order, where there is one
// (products_avx512.hpp), and where there is none they are moved on the way (products_decode.hpp).
//
// Every group begins with a block: with a group size that is no multiple of 16, blocks are padded.
#pragma once

#include <cstddef>

namespace plyweight {

inline constexpr std::size_t kTileRows = 32, kBlockInputs = 16, kLineBytes = 64;
inline constexpr int kMaxBits = 8;

}  // namespace plyweight
