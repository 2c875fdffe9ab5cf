"""A second reader of artifacts, written from ``docs/format.md`` alone.

It imports nothing of plyweight: where the two agree, it is the page that says so. It checks the
digests and then trusts the header; the limits of section 5 it leaves out.

    read(raw[:end_of_layer_i], b) == read(raw, b)    for every stored b <= bits_i
"""

import hashlib
import json
import struct

import numpy as np

ITEMS = {"BOOL": "?", "U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
ITEMS |= {"BF16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}  # BF16 as its 16 bits
SEXTETS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def require(condition, what):
    """Refuse the file otherwise."""
    if not condition:
        raise ValueError(f"not an artifact this page describes: {what}")


def read(raw, bit_width):
    """``(weights, plain)`` at a stored bit-width, from the bytes of a file or of a prefix.

    A weight is its ``codes`` (uint8, the bits known of the 8), ``levels`` (int8) and ``values``
    (float32); ``plain`` maps every other name, steps and zero points too, to its array.
    """
    data_start = 8 + struct.unpack_from("<Q", raw)[0]
    require(data_start <= len(raw), "the header is cut short")
    table = json.loads(raw[8:data_start])
    metadata = table.pop("__metadata__")
    require(metadata["layered.version"] == "1", "the version")
    require(json.loads(metadata["layered.requires"]) == [], "a requirement")
    held = verified_bit_widths(raw, data_start, json.loads(metadata["layered.layers"]))
    require(bit_width in held, f"{bit_width} bits are not among {held}")
    layers = [{} for _ in range(held.index(bit_width) + 1)]
    for full_name, entry in table.items():
        layer, _, name = full_name.partition("/")
        if not full_name.startswith("__pad__.") and int(layer[1:]) < len(layers):
            start, stop = (data_start + offset for offset in entry["data_offsets"])
            items = np.frombuffer(raw[start:stop], ITEMS[entry["dtype"]])
            layers[int(layer[1:])][name] = items.reshape(entry["shape"])
    weights = {}
    for name, spec in json.loads(metadata["layered.params"]).items():
        parts = [
            (layer.pop(f"{name}.q", None), layer.pop(f"{name}.gain", None)) for layer in layers
        ]
        brought = [(planes, gain) for planes, gain in parts if planes is not None]
        planes = np.concatenate([planes for planes, _ in brought])
        require(len(planes) == max(bit_width, spec["pinned"] or 0), f"the planes of {name}")
        # Only the last layer with planes says the gain; an older one is not inherited.
        weights[name] = decoded(planes, layers[0].pop(f"{name}.scale"), brought[-1][1], spec)
    return weights, {name: array for layer in layers for name, array in layer.items()}


def decoded(planes, scale, gain, spec):
    """Codes, levels and values of one weight whose first planes are known."""
    shape, known, dropped = spec["shape"], len(planes), 8 - len(planes)
    bits = np.unpackbits(planes, axis=1, count=int(np.prod(shape)), bitorder="little")
    codes = np.zeros(bits.shape[1], np.int16)
    for plane in bits:
        codes = codes << 1 | plane
    level = ((codes & (1 << known - 1) - 1) << dropped) + (1 << dropped >> 1)
    levels = np.where(bits[0] == 1, -level, level).astype(np.int8).reshape(shape)
    scale = scale if gain is None else scale * gain  # first these two: it decides the rounding
    values = levels.astype(np.float32) * spread(scale, spec)
    return {"codes": codes.astype(np.uint8).reshape(shape), "levels": levels, "values": values}


def spread(scale, spec):
    """One factor per row, or per row and input, in a shape that multiplies the weight's."""
    if spec["group"] is not None:
        scale = scale[:, np.arange(spec["shape"][1]) // spec["group"]]
    return scale.reshape(scale.shape + (1,) * (len(spec["shape"]) - scale.ndim))


def verified_bit_widths(raw, data_start, layers):
    """The bit-widths the bytes hold, once all digests of their layers are found right."""
    held, stop = [], data_start
    for layer in layers:
        if stop == len(raw) and layer["bytes"]:
            break  # a prefix; a layer without bytes is held with the one before it
        start, stop = stop, stop + layer["bytes"]
        require(stop <= len(raw), "it ends inside a layer")
        body, size = raw[start:stop], layer["chunk"]
        require(hashlib.sha256(body).hexdigest() == layer["sha256"], "the digest of a layer")
        chunks = [hashlib.sha256(body[at : at + size]) for at in range(0, len(body), size)]
        sextets = np.array([SEXTETS.index(c) for c in layer["chunks"].rstrip("=")], np.uint8)
        bits = np.unpackbits(sextets).reshape(-1, 8)[:, 2:]
        stated = np.packbits(bits)[: len(chunks) * 32].tobytes()
        require(stated == b"".join(c.digest() for c in chunks), "the digest of a chunk")
        held.append(layer["bits"])
    require(stop == len(raw), "it has bytes past its last layer")
    return held
