// 64 codes at a time into planes, 16 out of them.

#include <arm_neon.h>

#include "planes.hpp"

namespace plyweight::neon {
namespace {

constexpr std::uint8_t kPlaces[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};

}  // namespace

std::size_t pack(const std::uint8_t* codes, std::size_t num_codes, std::uint8_t* const* planes,
                 int num_planes, std::uint8_t& seen) {
    const uint8x16_t places = vld1q_u8(kPlaces);
    uint8x16_t all = vdupq_n_u8(0);
    std::size_t done = 0;
    for (; done + 64 <= num_codes; done += 64) {
        uint8x16_t bits[4];
        for (int part = 0; part < 4; ++part) {
            bits[part] = vld1q_u8(codes + done + 16 * part);
            all = vorrq_u8(all, bits[part]);
        }
        for (int row = 0; row < num_planes; ++row) {
            const uint8x16_t bit = vdupq_n_u8(static_cast<std::uint8_t>(1 << (num_planes - 1 - row)));
            uint8x16_t placed[4];
            for (int part = 0; part < 4; ++part) {
                placed[part] = vandq_u8(vtstq_u8(bits[part], bit), places);
            }
            // Sums of eight neighbours, in three steps of pairs.
            const uint8x16_t low = vpaddq_u8(placed[0], placed[1]);
            const uint8x16_t high = vpaddq_u8(placed[2], placed[3]);
            const uint8x16_t half = vpaddq_u8(low, high);
            vst1_u8(planes[row] + done / 8, vget_low_u8(vpaddq_u8(half, half)));
        }
    }
    std::uint8_t bytes[16];
    vst1q_u8(bytes, all);
    for (const std::uint8_t byte : bytes) seen = static_cast<std::uint8_t>(seen | byte);
    return done;
}

std::size_t unpack(const std::uint8_t* const* planes, int num_planes, std::uint8_t* codes,
                   std::size_t num_codes) {
    const uint8x16_t places = vld1q_u8(kPlaces);
    std::size_t done = 0;
    for (; done + 16 <= num_codes; done += 16) {
        uint8x16_t found = vdupq_n_u8(0);
        for (int row = 0; row < num_planes; ++row) {
            const std::uint8_t* bytes = planes[row] + done / 8;
            const uint8x16_t copies = vcombine_u8(vdup_n_u8(bytes[0]), vdup_n_u8(bytes[1]));
            const uint8x16_t bits = vtstq_u8(copies, places);
            found = vsubq_u8(vaddq_u8(found, found), bits);  // a one is -1 here
        }
        vst1q_u8(codes + done, found);
    }
    return done;
}

}  // namespace plyweight::neon
