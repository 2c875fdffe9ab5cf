// The border of the products: what module.cpp is for the planes of the codec.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "cpu.hpp"
#include "module.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace plyweight {
namespace {

using BytesIn = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowsIn = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsIn = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Sums of as many products of 127 * 127 fit an int32.
constexpr std::size_t kMaxGroupInputs = std::size_t{1} << 17;

// A numpy array of its own memory.
template <class T>
struct Array {
    explicit Array(std::size_t rows, std::size_t columns)
        : data(new T[rows * columns]), shape{rows, columns} {}
    nb::object release(std::size_t dimensions) {
        T* memory = data.release();
        nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<T*>(p); });
        return nb::cast(nb::ndarray<nb::numpy, T>(memory, dimensions, shape + (2 - dimensions), owner));
    }
    std::unique_ptr<T[]> data;
    std::size_t shape[2];
};

template <class T>
void check_aligned(const T* data) {
    if (reinterpret_cast<std::uintptr_t>(data) % alignof(T) != 0) refuse("an array is not aligned");
}

void check_bits(int bits) {
    if (bits < 1 || bits > kMaxBits) refuse(std::to_string(bits) + " bits; a code has 1 to 8");
}

void check_threads(int num_threads) {
    if (num_threads < 1) refuse(std::to_string(num_threads) + " threads; give 1 or more");
}

void construct(PlaneMatrix* self, std::size_t out, std::size_t in, std::size_t group_size) {
    // What is padded must not be more than a size can say: rows to 32, inputs of a group to 16.
    constexpr std::size_t most = std::size_t{1} << 31;
    if (out < 1 || in < 1 || out > most || in > most) {
        refuse("a weight (" + std::to_string(out) + ", " + std::to_string(in) +
               "); sides of 1 to 2**31 are computed with");
    }
    new (self) PlaneMatrix(out, in, group_size);
}

void check_wire(const PlaneMatrix& self, const BytesIn& wire) {
    if (wire.shape(0) != self.wire_bytes()) {
        refuse("a plane of " + std::to_string(wire.shape(0)) + " bytes; this matrix has planes of " +
               std::to_string(self.wire_bytes()));
    }
}

void add_plane(PlaneMatrix& self, const BytesIn& wire) {
    check_wire(self, wire);
    const nb::gil_scoped_release released;
    self.add_plane(wire.data());
}

ReadyPlane ready_plane(const PlaneMatrix& self, const BytesIn& wire, int index) {
    check_wire(self, wire);
    if (index < 0 || index >= kMaxBits) refuse("there is no plane " + std::to_string(index));
    const nb::gil_scoped_release released;
    return self.ready_plane(wire.data(), index);
}

void add_ready(PlaneMatrix& self, const ReadyPlane& plane) {
    if (plane.lines->bytes() != self.plane_bytes()) refuse("the plane is one of another matrix");
    self.add_plane(plane);
}

nb::object plane(const PlaneMatrix& self, int index) {
    if (index < 0 || index >= kMaxBits) refuse("there is no plane " + std::to_string(index));
    Array<std::uint8_t> wire(1, self.wire_bytes());
    {
        const nb::gil_scoped_release released;
        self.copy_plane(index, wire.data.get());
    }
    return wire.release(1);
}

nb::object levels_of(const PlaneMatrix& self, int bits, std::size_t start, std::size_t stop,
                     Variant variant, int num_threads) {
    check_runs(variant);
    check_bits(bits);
    check_threads(num_threads);
    if (start > stop || stop > self.out()) {
        refuse("rows " + std::to_string(start) + " to " + std::to_string(stop) + "; there are " +
               std::to_string(self.out()));
    }
    Array<std::int8_t> found(stop - start, self.in());
    {
        const nb::gil_scoped_release released;
        levels(self, bits, start, stop, variant, num_threads, found.data.get());
    }
    return found.release(2);
}

TiledScales tiled_scales(const PlaneMatrix& self, const FloatsIn& scale) {
    check_aligned(scale.data());
    if (scale.shape(0) != self.out() * self.num_groups()) {
        refuse(std::to_string(scale.shape(0)) + " scales; the weight has " +
               std::to_string(self.out() * self.num_groups()));
    }
    const nb::gil_scoped_release released;
    return self.tiled(scale.data());
}

nb::object product_of(const PlaneMatrix& self, const RowsIn& x, const TiledScales& scales, float gain,
                      int bits, const std::string& mode, Variant variant, int num_threads) {
    check_runs(variant);
    check_bits(bits);
    check_threads(num_threads);
    check_aligned(x.data());
    if (x.shape(1) != self.in()) {
        refuse("activations of " + std::to_string(x.shape(1)) + " inputs; the weight takes " +
               std::to_string(self.in()));
    }
    if (scales.out != self.out() || scales.num_groups != self.num_groups()) {
        refuse("the scales are those of another matrix");
    }
    if (mode != "int8" && mode != "float") refuse("the mode is " + mode + "; give int8 or float");
    if (mode == "int8" && self.group_size() > kMaxGroupInputs) {
        refuse(std::to_string(self.group_size()) + " inputs share a scale; sums of more than " +
               std::to_string(kMaxGroupInputs) + " may not fit an int32");
    }
    Array<float> y(x.shape(0), self.out());
    {
        const nb::gil_scoped_release released;
        product(self, x.data(), x.shape(0), scales, gain, bits,
                mode == "int8" ? Mode::int8 : Mode::floating, variant, num_threads, y.data.get());
    }
    return y.release(2);
}

}  // namespace

void bind_products(nb::module_& m) {
    nb::class_<ReadyPlane>(m, "ReadyPlane");
    nb::class_<TiledScales>(m, "TiledScales");
    nb::class_<PlaneMatrix>(m, "PlaneMatrix")
        .def("__init__", &construct, nb::arg("out"), nb::arg("in_"), nb::arg("group_size"))
        .def("add_plane", &add_plane, nb::arg("plane").noconvert())
        .def("ready_plane", &ready_plane, nb::arg("plane").noconvert(), nb::arg("index"))
        .def("add_ready", &add_ready, nb::arg("plane"))
        .def("drop_plane", &PlaneMatrix::drop_plane, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("num_planes", &PlaneMatrix::num_planes)
        .def_prop_ro("nbytes", &PlaneMatrix::nbytes)
        .def("plane", &plane, nb::arg("index"))
        .def("levels", &levels_of, nb::arg("bits"), nb::arg("start"), nb::arg("stop"),
             nb::arg("variant"), nb::arg("num_threads"))
        .def("tiled_scales", &tiled_scales, nb::arg("scales").noconvert())
        .def("product", &product_of, nb::arg("x").noconvert(), nb::arg("scales"), nb::arg("gain"),
             nb::arg("bits"), nb::arg("mode"), nb::arg("variant"), nb::arg("num_threads"));
}

}  // namespace plyweight
