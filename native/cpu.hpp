// What this processor can do, and which variants of a kernel may therefore be called.
#pragma once

#include <string>
#include <vector>

namespace plyweight {

// A way to compute, fastest last. avx512 is Ice Lake or Zen 4 and later: F, BW, VL, DQ, VBMI, VNNI
// and GFNI together; processors with a part of these run avx2, which needs FMA and F16C as well.
enum class Variant { portable, neon, avx2, avx512 };

// Of the instruction sets that matter here, those that the processor has and the system saves.
const std::vector<std::string>& cpu_features();

// Whether `feature` is one of them.
bool cpu_has(const char* feature);

// Whether the variant is part of this build and this processor can run it.
bool runs(Variant variant);

}  // namespace plyweight
