"""Make the golden artifact of version 1, and the annotated dump of it that docs/format.md prints.

    python tests/golden/make.py            writes v1.layered.safetensors, v1.json and corpus/
    python tests/golden/make.py --dump     prints the dump

The artifact was written once, in November 2026, and must be readable for ever: every later reader
opens it and finds what v1.json records. It is made again only to see that nothing has changed.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from plyweight.artifact import (
    Activation,
    Alignment,
    ByteRange,
    Header,
    Layer,
    LayerContent,
    LayeredWeight,
    ModelInfo,
    Sidecar,
    TensorData,
    TensorEntry,
    write_artifact,
)
from plyweight.codec import codes_at, decode, encode, spread, to_planes

HERE = Path(__file__).parent
ARTIFACT, VALUES = HERE / "v1.layered.safetensors", HERE / "v1.json"
CORPUS = HERE / "corpus"

BIT_WIDTHS = (2, 3, 8)
WEIGHTS = {"conv.weight": LayeredWeight((2, 1, 3), 1, 8), "fc.weight": LayeredWeight((2, 2))}
FLOATS = {
    "conv.weight": [[[-1.27, 0.01, -0.001]], [[0.6, -0.6, 0.3]]],
    "fc.weight": [[0.50, -0.30], [0.06, -1.60]],  # the example that the page works by hand
}
SCALES = {"conv.weight": [[0.01], [0.005]], "fc.weight": [0.01, 0.02]}
GAINS = {("fc.weight", 2): [1.25], ("fc.weight", 3): [1.0625, 0.9375]}  # of the tensor, of each row
STEPS = {2: 0.5, 3: 0.25, 8: 0.0078125}
BIASES = {2: [0.125, -2.0], 3: [0.0, -1.5], 8: [-0.0, 1.0]}


def float32(name, values):
    """A tensor of float32."""
    array = np.asarray(values, "<f4")
    return TensorData(name, "F32", array.shape, array.tobytes())


def codes_of(name):
    """The 8-bit codes of a weight."""
    weight = WEIGHTS[name]
    scale = spread(np.float32(SCALES[name]), weight.shape, weight.group_size)
    return encode(np.float32(FLOATS[name]), scale)


def layers():
    """The tensors of each layer."""
    contents = []
    for index, bit_width in enumerate(BIT_WIDTHS):
        previous = BIT_WIDTHS[index - 1] if index else 0
        tensors = []
        for name, weight in WEIGHTS.items():
            first = weight.width_at(previous) if index else 0
            rows = to_planes(codes_of(name), 8)[first : weight.width_at(bit_width)]
            if len(rows):
                tensors.append(TensorData(f"{name}.q", "U8", rows.shape, rows.tobytes()))
            if not index:
                tensors.append(float32(f"{name}.scale", SCALES[name]))
            if (name, bit_width) in GAINS:
                tensors.append(float32(f"{name}.gain", GAINS[name, bit_width]))
        tensors.append(float32("fc.step", [STEPS[bit_width]]))
        if not index:
            tensors.append(float32("fc.zero_point", [1]))
            count = np.array(7, "<i8").tobytes()
            tensors.append(TensorData("norm.count", "I64", (), count))
            half = np.array([0.5, -0.25], "<f2")
            tensors.append(TensorData("norm.bias", "F16", half.shape, half.tobytes()))
        tensors.append(float32("fc.bias", BIASES[bit_width]))
        contents.append(LayerContent(bit_width, tensors))
    return contents


def write(path):
    """Write the artifact."""
    return write_artifact(
        path,
        layers=layers(),
        weights=WEIGHTS,
        activations={"fc": Activation("offset", {2: 3, 3: 4, 8: 8})},
        model=ModelInfo("golden", 1, "plyweight", "Apache-2.0"),
        evaluation={2: {"top1": "66.1"}, 8: {"top1": "71.25"}},
        io={"inputs": [{"name": "x", "shape": [1, 2]}]},
        chunk_bytes=64 * 2**10,
    )


def values():
    """What a reader must find at each bit-width, computed from the floats above."""
    found = {}
    for bit_width in BIT_WIDTHS:
        held = {}
        for name, weight in WEIGHTS.items():
            own = weight.width_at(bit_width)
            scale = np.float32(SCALES[name])
            if (name, bit_width) in GAINS:
                scale = scale * np.float32(GAINS[name, bit_width])
            levels = decode(codes_at(codes_of(name), own), own)
            held[name] = levels * spread(scale, weight.shape, weight.group_size)
        held |= {"fc.step": [STEPS[bit_width]], "fc.zero_point": [1]}
        held |= {"fc.bias": BIASES[bit_width], "norm.bias": [0.5, -0.25], "norm.count": 7}
        found[str(bit_width)] = {
            name: {"shape": list(np.shape(v)), "values": [float(x) for x in np.ravel(v)]}
            for name, v in held.items()
        }
    return found


def corpus():
    """What scripts/fuzz_header.py starts from: texts of headers and sidecars, by file name."""
    header = Header.parse(ARTIFACT.read_bytes())
    small = Header(
        alignment=Alignment(8, 8),
        model=ModelInfo("a", 0, "b"),
        weights={"w": LayeredWeight((1,))},
        activations={},
        layers=(Layer("base", 1, ByteRange(0, 16), "0" * 64, 65536, (bytes(32),)),),
        tensors=(
            TensorEntry("L0/w.q", "U8", (1, 1), ByteRange(0, 1)),
            TensorEntry("__pad__.0", "U8", (7,), ByteRange(1, 8)),
            TensorEntry("L0/w.scale", "F32", (1,), ByteRange(8, 12)),
            TensorEntry("__pad__.1", "U8", (4,), ByteRange(12, 16)),
        ),
        extensions={"layered.x-note": "ä \U0001f642"},
    )
    return {
        "header-golden": header.emit()[8:].rstrip(b" "),
        "header-small": small.emit()[8:].rstrip(b" "),
        "sidecar-split": Sidecar.of(header).emit(),
        "sidecar-one-file": Sidecar.of(header, file=ARTIFACT.name).emit(),
    }


# --- the dump --------------------------------------------------------------------------------

WIDTH = 104  # of the text in a line
NUMPY = {"U8": "u1", "F32": "<f4", "F16": "<f2", "I64": "<i8"}


def dump(data):
    """Every byte of the artifact: the text of the header as text, all others in hexadecimal."""
    header = Header.parse(data)
    text = data[8 : header.data_start].decode()
    lines = [_line(0, data[:8].hex(" "), f"N: the text has {len(text)} bytes")]
    offset = 8
    # Each field of __metadata__ and each tensor starts a line.
    starts = r'(?=(?<=[{,])"(?:__metadata__|format|layered\.\w+|L\d/[\w.]+|__pad__\.\d+)":)'
    for piece in re.split(starts, text.rstrip(" ")):
        for start in range(0, len(piece), WIDTH):
            part = piece[start : start + WIDTH]
            lines.append(f"{offset:04x}  {part}")
            offset += len(part)
    spaces = header.data_start - offset
    if spaces:
        lines.append(f"{offset:04x}  {f'({spaces} spaces)'}")
    for index, layer in enumerate(header.layers):
        lines.append(f"\nlayer {index}: {layer.bit_width} bits, bytes {layer.byte_range}")
        for entry in header.tensors_of(index):
            place = header.file_range(entry)
            raw = data[place.start : place.stop]
            array = np.frombuffer(raw, NUMPY[entry.dtype])
            rows = array.reshape(entry.shape) if entry.name.endswith(".q") else [array]
            start = place.start
            for number, row in enumerate(rows):
                name = entry.name if not number else f"{'':{len(entry.name)}}"
                lines.append(_line(start, row.tobytes().hex(" "), f"{name} {_shown(entry, row)}"))
                start += row.nbytes
    return "\n".join(line.rstrip() for line in lines)


def _shown(entry, row):
    if entry.name.startswith("__pad__"):
        return ""
    if entry.name.endswith(".q"):
        return "".join(str(bit) for bit in np.unpackbits(row, bitorder="little"))
    return " ".join(f"{x:g}" for x in row.tolist())


def _line(offset, hexadecimal, what):
    return f"{offset:04x}  {hexadecimal:<24}  {what}"


def main():
    """Write the files, or print the dump of the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dump", action="store_true")
    if parser.parse_args().dump:
        print(dump(ARTIFACT.read_bytes()))
        return
    write(ARTIFACT)
    VALUES.write_text(json.dumps(values(), indent=1) + "\n")
    for name, text in corpus().items():
        (CORPUS / name).write_bytes(text)


if __name__ == "__main__":
    main()
