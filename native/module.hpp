// What the parts of the border share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "cpu.hpp"

namespace plyweight {

[[noreturn]] inline void refuse(const std::string& message) {
    throw nanobind::value_error(message.c_str());
}

inline void check_runs(Variant variant) {
    if (!runs(variant)) refuse("this variant cannot run here; ask variants() for those that can");
}

void bind_products(nanobind::module_& m);  // module_products.cpp

}  // namespace plyweight
