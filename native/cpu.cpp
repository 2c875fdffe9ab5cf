#include "cpu.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace plyweight {
namespace {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros if there is none
    return r;
}

// Registers that the system saves when it changes tasks. Using others would corrupt them.
std::uint64_t saved_state() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
}

std::vector<std::string> detect() {
    constexpr std::uint64_t ymm = 0x6;             // XMM and the upper halves of YMM
    constexpr std::uint64_t zmm = ymm | 0xe0;      // masks, upper halves of ZMM, ZMM16 to 31
    const auto one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    const auto bit = [](std::uint32_t word, int place) { return (word >> place & 1) != 0; };

    std::vector<std::string> found;
    const std::uint64_t saved = bit(one.ecx, 27) ? saved_state() : 0;  // OSXSAVE
    if ((saved & ymm) != ymm || !bit(one.ecx, 28)) return found;
    const auto add = [&found](const char* name, bool is_there) {
        if (is_there) found.emplace_back(name);
    };
    add("avx2", bit(seven.ebx, 5));
    add("fma", bit(one.ecx, 12));
    add("f16c", bit(one.ecx, 29));
    add("avx_vnni", bit(seven_one.eax, 4));
    add("gfni", bit(seven.ecx, 8));
    if ((saved & zmm) != zmm || !bit(seven.ebx, 16)) return found;
    add("avx512f", true);
    add("avx512dq", bit(seven.ebx, 17));
    add("avx512bw", bit(seven.ebx, 30));
    add("avx512vl", bit(seven.ebx, 31));
    add("avx512vbmi", bit(seven.ecx, 1));
    add("avx512vnni", bit(seven.ecx, 11));
    add("avx512bf16", bit(seven_one.eax, 5));
    return found;
}

#elif defined(__aarch64__)

std::vector<std::string> detect() {
    std::vector<std::string> found{"neon"};  // part of every AArch64 that runs a system
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.emplace_back("dotprod");
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) found.emplace_back("i8mm");
#elif defined(__APPLE__)
    const auto is_there = [](const char* name) {
        int value = 0;
        std::size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    if (is_there("hw.optional.arm.FEAT_DotProd")) found.emplace_back("dotprod");
    if (is_there("hw.optional.arm.FEAT_I8MM")) found.emplace_back("i8mm");
#endif
    return found;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

bool has(std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(), cpu_has);
}

}  // namespace

const std::vector<std::string>& cpu_features() {
    static const std::vector<std::string> features = detect();
    return features;
}

bool cpu_has(const char* feature) {
    const auto& found = cpu_features();
    return std::find(found.begin(), found.end(), feature) != found.end();
}

bool runs(Variant variant) {
    switch (variant) {
        case Variant::portable:
            return true;
#ifdef PLYWEIGHT_HAS_NEON
        case Variant::neon:
            return has({"neon"});
#endif
#ifdef PLYWEIGHT_HAS_AVX2
        case Variant::avx2:
            return has({"avx2", "fma", "f16c"});
#endif
#ifdef PLYWEIGHT_HAS_AVX512
        case Variant::avx512:
            return has({"avx2", "fma", "f16c", "gfni", "avx512f", "avx512dq", "avx512bw",
                        "avx512vl", "avx512vbmi", "avx512vnni"});
#endif
        default:
            return false;
    }
}

}  // namespace plyweight
