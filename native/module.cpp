// plyweight._native: the border. Types, sizes and the processor are checked here, before any byte is
// read; past it, kernels trust what they get. src/plyweight/_native.pyi is the same for Python.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "cpu.hpp"
#include "module.hpp"
#include "planes.hpp"

namespace nb = nanobind;

namespace plyweight {
namespace {

using BytesIn = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_planes(std::size_t num_planes, std::size_t bytes, std::size_t num_codes) {
    if (num_planes < 1 || num_planes > kMaxPlanes) {
        refuse(std::to_string(num_planes) + " planes were given; a code has 1 to 8");
    }
    if (bytes != plane_bytes(num_codes)) {
        refuse("a plane of " + std::to_string(bytes) + " bytes; " + std::to_string(num_codes) +
               " codes need " + std::to_string(plane_bytes(num_codes)));
    }
}

std::uint8_t pack_planes(const BytesIn& codes, const RowsOut& planes, Variant variant) {
    check_runs(variant);
    check_planes(planes.shape(0), planes.shape(1), codes.shape(0));
    PlanesOut rows{};
    for (std::size_t row = 0; row < planes.shape(0); ++row) {
        rows[row] = planes.data() + row * planes.shape(1);
    }
    const auto num_planes = static_cast<int>(planes.shape(0));
    const nb::gil_scoped_release released;
    return pack(variant, codes.data(), codes.shape(0), rows, num_planes);
}

PlanesIn checked_rows(const std::vector<BytesIn>& planes, std::size_t num_codes, Variant variant) {
    check_runs(variant);
    PlanesIn rows{};
    check_planes(planes.size(), plane_bytes(num_codes), num_codes);
    for (std::size_t row = 0; row < planes.size(); ++row) {
        check_planes(planes.size(), planes[row].shape(0), num_codes);
        rows[row] = planes[row].data();
    }
    return rows;
}

void unpack_planes(const std::vector<BytesIn>& planes, const BytesOut& codes, Variant variant) {
    const PlanesIn rows = checked_rows(planes, codes.shape(0), variant);
    const nb::gil_scoped_release released;
    unpack(variant, rows, static_cast<int>(planes.size()), codes.data(), codes.shape(0));
}

void unpack_plane_levels(const std::vector<BytesIn>& planes, const BytesOut& levels,
                         Variant variant) {
    const PlanesIn rows = checked_rows(planes, levels.shape(0), variant);
    const nb::gil_scoped_release released;
    unpack_levels(variant, rows, static_cast<int>(planes.size()), levels.data(), levels.shape(0));
}

// Those that run here, the fastest first.
std::vector<Variant> variants() {
    std::vector<Variant> found;
    for (const Variant variant :
         {Variant::avx512, Variant::avx2, Variant::neon, Variant::portable}) {
        if (runs(variant)) found.push_back(variant);
    }
    return found;
}

}  // namespace
}  // namespace plyweight

NB_MODULE(_native, m) {
    using namespace plyweight;
    m.attr("SOURCES") = PLYWEIGHT_SOURCES;
    nb::enum_<Variant>(m, "Variant")
        .value("portable", Variant::portable)
        .value("neon", Variant::neon)
        .value("avx2", Variant::avx2)
        .value("avx512", Variant::avx512);
    m.def("cpu_features", &cpu_features);
    m.def("variants", &variants);
    m.def("pack_planes", &pack_planes, nb::arg("codes").noconvert(), nb::arg("planes").noconvert(),
          nb::arg("variant"));
    m.def("unpack_planes", &unpack_planes, nb::arg("planes").noconvert(),
          nb::arg("codes").noconvert(), nb::arg("variant"));
    m.def("unpack_levels", &unpack_plane_levels, nb::arg("planes").noconvert(),
          nb::arg("levels").noconvert(), nb::arg("variant"));
    bind_products(m);
}
