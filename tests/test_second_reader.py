"""docs/format.md says enough: a reader written from it alone gets what training computed.

For every stored bit-width ``b``, from the whole file and from the prefix that ends at ``b``

    second_reader.read(raw, b) == the weights, rows and steps of the trained model at b

bit for bit: both compute the same products of float32 in the same order.
"""

import ast
import base64
import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import second_reader

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402  after the line above, which may skip
from safetensors.torch import load as stock_load  # noqa: E402
from torch import nn  # noqa: E402

from plyweight import prepare, set_bit_width  # noqa: E402
from plyweight.nn import at_bit_width  # noqa: E402
from plyweight.nn.layered import LayeredModule  # noqa: E402
from plyweight.packing import pack  # noqa: E402

ALL = (1, 2, 3, 4, 5, 6, 7, 8)


class Net(nn.Module):
    """Every kind of layered module, and sizes that fill no last byte and no last group."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)  # 135 weights
        self.bn = nn.BatchNorm2d(5)
        self.depthwise = nn.Conv2d(5, 5, 3, groups=5, padding=1)  # 45, and one input
        self.conv1d = nn.Conv1d(5, 7, 3)  # 105
        self.bn1d = nn.BatchNorm1d(7)
        self.embedding = nn.Embedding(11, 7)  # 77
        self.fc = nn.Linear(7, 1)  # 7: less than a byte
        self.register_buffer("count", torch.tensor(3))  # shape []
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.empty(0, 4))  # no bytes at all

    def forward(self, images):
        x = self.depthwise(F.relu(self.bn(self.conv(images)))).flatten(start_dim=2)
        x = self.bn1d(self.conv1d(F.gelu(9 * x))).mean(dim=2)
        return self.fc(x + self.embedding(torch.arange(len(x))))


CASES = {
    "rows": (ALL, {}),
    "groups": (ALL, {"group_size": 4}),
    "pins": (ALL, {"pinned": {"fc": 8, "conv": 3}, "activations": None}),
    "groups and pins": (ALL, {"group_size": 3, "pinned": {"fc": 8}}),
    "some bit-widths": ((2, 3, 5, 8), {"pinned": {"embedding": 4}, "activations": 4}),
    "layers without bytes": (ALL, {"pinned": {"": 8}, "exclude": ("bn", "bn1d")}),
    "gain per scale": (ALL, {"group_size": 2}),
}


class Packed:
    """A model after a batch at every bit-width, its file, and where the file's layers end."""

    def __init__(self, path, bit_widths, options, *, gain_per_scale, dtype=torch.float32):
        torch.manual_seed(0)
        self.bit_widths = bit_widths
        self.model = prepare(Net().to(dtype), bit_widths, **options)
        for bit_width in reversed(bit_widths):
            with torch.no_grad(), at_bit_width(self.model, bit_width):
                self.model(torch.randn(6, 3, 6, 6, dtype=dtype))
        with torch.no_grad():
            for module in self.weights.values():
                # As training leaves them: no powers of two, and every gain its own.
                quantizer = module.weight_quantizer
                shape = quantizer.clip.shape if gain_per_scale else (1,)
                gains = {b: torch.rand(shape) + 0.5 for b in quantizer.own_bit_widths[:-1]}
                quantizer.set_grid(quantizer.scale * (torch.rand(()) + 0.5), gains)
            for name, rows in self.rows.items():
                rows += torch.rand(rows.shape, dtype=rows.dtype) * (name != "count")
            for quantizer in self.activations.values():
                quantizer.clip *= torch.rand(quantizer.clip.shape) + 0.5
        pack(self.model, path)
        self.raw = path.read_bytes()
        self.data_start = 8 + int.from_bytes(self.raw[:8], "little")
        self.metadata = json.loads(self.raw[8 : self.data_start])["__metadata__"]
        sizes = [layer["bytes"] for layer in json.loads(self.metadata["layered.layers"])]
        ends = (self.data_start + np.cumsum(sizes)).tolist()
        self.stops = dict(zip(bit_widths, ends, strict=True))

    @property
    def weights(self):
        """Layered modules by the name of their parameter."""
        modules = self.model.named_modules()
        return {f"{name}.weight": m for name, m in modules if isinstance(m, LayeredModule)}

    @property
    def activations(self):
        return {
            name.removesuffix(".weight"): module.input_quantizer
            for name, module in self.weights.items()
            if not isinstance(module.input_quantizer, nn.Identity)
        }

    @property
    def rows(self):
        """Batch-norm tensors ``(bit-widths, features)``, unless the batch norms stay float."""
        return {
            f"{name}.{leaf}": getattr(module, leaf)
            for name, module in self.model.named_modules()
            if hasattr(module, "running_mean") and hasattr(module, "row_of")
            for leaf in ("weight", "bias", "running_mean", "running_var")
        }

    def readings(self):
        """At every bit-width, from every prefix that holds it, the whole file included."""
        for bit_width in self.bit_widths:
            set_bit_width(self.model, bit_width)
            for stop in sorted({s for s in self.stops.values() if s >= self.stops[bit_width]}):
                yield bit_width, *second_reader.read(self.raw[:stop], bit_width)


@pytest.fixture(scope="module", params=CASES)
def packed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("second") / "net.layered.safetensors"
    gain_per_scale = request.param == "gain per scale"
    return Packed(path, *CASES[request.param], gain_per_scale=gain_per_scale)


def bits_of(array):
    """Every bit of an array or tensor, so that -0.0 is not 0.0."""
    array = array.detach().numpy() if isinstance(array, torch.Tensor) else array
    return array.dtype, array.shape, array.tobytes()


def test_its_weights_are_those_of_training_from_every_prefix(packed):
    for _, weights, _ in packed.readings():
        assert weights.keys() == packed.weights.keys()
        for name, module in packed.weights.items():
            assert bits_of(weights[name]["values"]) == bits_of(module.weight)


def test_its_codes_are_the_first_bits_of_the_codes_of_training(packed):
    for bit_width, weights, _ in packed.readings():
        for name, module in packed.weights.items():
            own = max(bit_width, int(module.weight_quantizer.pinned))
            codes = module.weight_quantizer.codes(module.latent_weight) >> (8 - own)
            assert bits_of(weights[name]["codes"]) == bits_of(codes)
            assert weights[name]["levels"].dtype == np.int8


def test_bit_widths_differ_so_that_equality_says_something(packed):
    free = [n for n, m in packed.weights.items() if not int(m.weight_quantizer.pinned)]
    for name in free:
        read = [second_reader.read(packed.raw, b)[0][name]["values"] for b in packed.bit_widths]
        assert len({values.tobytes() for values in read}) == len(packed.bit_widths)


def test_its_plain_tensors_are_those_valid_at_the_bit_width(packed):
    state = packed.model.state_dict()
    for bit_width, _, plain in packed.readings():
        index = packed.bit_widths.index(bit_width)
        expected = {name: rows[index] for name, rows in packed.rows.items()}
        for name, quantizer in packed.activations.items():
            expected[f"{name}.step"] = quantizer.row_of(quantizer.steps).reshape(1)
            if quantizer.kind == "offset":
                zero_point = quantizer.row_of(quantizer.zero_points).reshape(1)
                expected[f"{name}.zero_point"] = zero_point
        for name in plain.keys() - expected.keys():
            expected[name] = state[name]
        assert {"count", "mask", "none", "fc.bias"} <= plain.keys() == expected.keys()
        for name, tensor in expected.items():
            assert bits_of(plain[name]) == bits_of(tensor)


def test_the_pages_formula_for_inputs_is_that_of_training(packed):
    entries = json.loads(packed.metadata["layered.activations"])
    assert entries.keys() == packed.activations.keys()
    kinds = {entry["kind"] for entry in entries.values()}
    assert kinds in ({"unsigned", "signed", "offset"}, set())  # without activations, none
    for bit_width in packed.bit_widths:
        set_bit_width(packed.model, bit_width)
        _, plain = second_reader.read(packed.raw, bit_width)
        for name, quantizer in packed.activations.items():
            kind, step = entries[name]["kind"], plain[f"{name}.step"]
            own = max(bit_width, int(quantizer.pinned))
            a = entries[name]["bits"][str(own)]
            h = np.float32(0.5 if kind == "signed" and a == 1 else 0)
            z = {"unsigned": 0, "signed": 2 ** (a - 1)}.get(kind, plain.get(f"{name}.zero_point"))
            # Steps of a half reach every tie, and both ends.
            x = np.arange(-600, 601, dtype=np.float32) / 2 * step
            value = step * (h + np.clip(np.round(x / step - h), -z, 2**a - 1 - z))
            trained = quantizer(torch.from_numpy(x)).detach().numpy()
            assert np.array_equal(value.astype(np.float32), trained)


def test_stock_safetensors_opens_the_file_and_gives_the_same_tensors(packed):
    stock = stock_load(packed.raw)
    last = packed.bit_widths[-1]
    weights, plain = second_reader.read(packed.raw, last)
    layers = [f"L{i}/" for i in range(len(packed.bit_widths))]
    for name, array in plain.items():
        newest = [stock[layer + name] for layer in layers if layer + name in stock][-1]
        assert bits_of(newest) == bits_of(array)
    for name, weight in weights.items():
        planes = [stock[f"{layer}{name}.q"] for layer in layers if f"{layer}{name}.q" in stock]
        codes = weight["codes"].reshape(-1)
        rows = [np.packbits(codes >> 7 - plane & 1, bitorder="little") for plane in range(8)]
        assert np.array_equal(torch.cat(planes).numpy(), np.stack(rows))


def test_a_flipped_byte_in_any_layer_is_refused(packed):
    # As a set: layers without bytes have none to flip.
    bounds = sorted({packed.data_start, *packed.stops.values()})
    for start, stop in itertools.pairwise(bounds):
        for place in (start, (start + stop) // 2, stop - 1):
            broken = bytearray(packed.raw)
            broken[place] ^= 1
            with pytest.raises(ValueError, match="digest of a layer"):
                second_reader.read(bytes(broken), packed.bit_widths[-1])


def test_a_wrong_digest_of_a_chunk_is_refused_though_the_layers_is_right(packed):
    (first, *_) = json.loads(packed.metadata["layered.layers"])
    chunks = first["chunks"].encode()
    wrong = (b"B" if chunks[:1] == b"A" else b"A") + chunks[1:]
    with pytest.raises(ValueError, match="digest of a chunk"):
        second_reader.read(packed.raw.replace(chunks, wrong, 1), packed.bit_widths[0])


def test_a_file_that_ends_inside_a_layer_or_after_the_last_is_refused(packed):
    for raw in (packed.raw[:-1], packed.raw + b"\0", packed.raw[: packed.data_start]):
        with pytest.raises(ValueError, match=r"ends inside|past its last|not among"):
            second_reader.read(raw, packed.bit_widths[0])


def test_a_bit_width_that_a_prefix_does_not_hold_is_refused(tmp_path):
    some = Packed(tmp_path / "some", (2, 3, 5, 8), {}, gain_per_scale=False)
    for stop, bit_width in ((2, 3), (3, 5), (5, 8), (8, 4)):
        with pytest.raises(ValueError, match=f"{bit_width} bits are not among"):
            second_reader.read(some.raw[: some.stops[stop]], bit_width)


def test_layers_without_bytes_are_held_with_the_one_before_them(tmp_path):
    options = {"pinned": {"": 8}, "exclude": ("bn", "bn1d")}
    pinned = Packed(tmp_path / "pinned", ALL, options, gain_per_scale=False)
    assert set(pinned.stops.values()) == {len(pinned.raw)}
    weights, _ = second_reader.read(pinned.raw, 1)
    assert weights["fc.weight"]["codes"].max() > 1


def test_a_model_in_a_narrower_type_rounds_the_values_once_more(tmp_path):
    narrow = Packed(tmp_path / "bf16", ALL, {}, gain_per_scale=False, dtype=torch.bfloat16)
    for _, weights, plain in narrow.readings():
        for name, module in narrow.weights.items():
            values = torch.from_numpy(weights[name]["values"]).bfloat16()
            assert torch.equal(values, module.weight)
        bits = narrow.model.fc.bias.detach().view(torch.int16).numpy()  # numpy has no bfloat16
        assert plain["fc.bias"].tobytes() == bits.tobytes()


def test_a_layer_of_several_chunks_is_verified_chunk_by_chunk():
    # Our chunks are 8 MiB; these are the smallest the format allows, and the last is shorter.
    raw = np.random.default_rng(0).bytes(2 * 2**16 + 1000)
    chunks = [hashlib.sha256(raw[at : at + 2**16]).digest() for at in range(0, len(raw), 2**16)]
    layer = {"bits": 2, "bytes": len(raw), "chunk": 2**16}
    layer |= {"sha256": hashlib.sha256(raw).hexdigest()}
    layer |= {"chunks": base64.b64encode(b"".join(chunks)).decode()}
    assert second_reader.verified_bit_widths(raw, 0, [layer]) == [2]
    layer |= {"chunks": base64.b64encode(b"".join(reversed(chunks))).decode()}
    with pytest.raises(ValueError, match="digest of a chunk"):
        second_reader.verified_bit_widths(raw, 0, [layer])


def test_by_hand_as_on_the_page():
    # The table under "By hand" of docs/format.md: the planes of four weights, and their levels.
    planes = np.array([[0x0A], [0x08], [0x01], [0x0B], [0x02], [0x02], [0x07], [0x04]], np.uint8)
    scale, spec = np.array([0.01, 0.02], np.float32), {"shape": [2, 2], "group": None}
    levels = {2: [32, -32, 32, -96], 3: [48, -16, 16, -80], 8: [50, -30, 3, -80]}
    for known, expected in levels.items():
        weight = second_reader.decoded(planes[:known], scale, None, spec)
        assert weight["levels"].reshape(-1).tolist() == expected
    at_two_bits = second_reader.decoded(planes[:2], scale, None, spec)["values"]
    assert at_two_bits == pytest.approx(np.array([[0.32, -0.32], [0.64, -1.92]]))  # as printed


def test_the_reader_has_at_most_100_lines_and_knows_nothing_of_plyweight():
    text = Path(second_reader.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    nodes = list(ast.walk(ast.parse(text)))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert imported <= {"numpy", *sys.stdlib_module_names}
