"""Hostile bytes: whatever they are, an ArtifactError or the truth."""

import ast
import base64
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from artifact.builders import (
    big_content,
    build,
    layer_contents,
    source,
    table_of,
    with_field,
    with_table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plyweight.artifact
from plyweight.artifact import (
    ArtifactReader,
    Header,
    LayerContent,
    TensorData,
    verify,
    write_artifact,
)
from plyweight.errors import ArtifactError, DigestError, HeaderError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "big"
    write_artifact(path, **big_content())
    return path.read_bytes()


def contents(raw):
    """Every tensor of every layer, verified."""
    reader = ArtifactReader(source(raw))
    return [
        {name: (v.dtype, v.shape, bytes(v.data)) for name, v in reader.read_layer(i).items()}
        for i in range(len(reader.header.layers))
    ]


def rehashed(data):
    """The file with digests that fit its data, as whoever owns the server could make it."""
    _, start = table_of(data)

    def change(layers):
        offset = start
        for layer in layers:
            digest = hashlib.sha256(data[offset : offset + layer["bytes"]])
            layer["sha256"] = digest.hexdigest()
            layer["chunks"] = base64.b64encode(digest.digest()).decode()
            offset += layer["bytes"]

    return with_field(data, "layered.layers", change)


def with_byte(data, position, value):
    return data[:position] + bytes([value]) + data[position + 1 :]


def test_two_hundred_flipped_bits_are_never_silently_different(data):
    rng = np.random.default_rng(0)
    header = Header.parse(data)
    original = contents(data)
    in_header = rng.integers(0, header.data_start, 100)
    in_layers = rng.integers(header.data_start, len(data), 100)
    for position in map(int, (*in_header, *in_layers)):
        changed = with_byte(data, position, data[position] ^ 1 << int(rng.integers(8)))
        if position >= header.data_start:
            with pytest.raises(DigestError, match=r"chunk 0 of layer \d \(\d bits\)"):
                contents(changed)
            continue
        try:
            got = contents(changed)
        except ArtifactError:
            continue
        # A changed header is another artifact, and says so; the data is what was packed.
        assert Header.parse(changed).artifact_id != header.artifact_id
        assert [sorted(layer.values()) for layer in got] == [
            sorted(layer.values()) for layer in original
        ]


def test_a_digest_error_names_layer_bit_width_chunk_and_tensors(big):
    header = Header.parse(big)
    assert len(header.layers[0].chunk_digests) == 3
    position = header.layers[0].byte_range.start + 70_000  # in the second plane
    with pytest.raises(DigestError) as caught:
        ArtifactReader(source(with_byte(big, position, big[position] ^ 1))).read_layer(0)
    start = header.layers[0].byte_range.start + 65536
    assert str(caught.value) == (
        "tiny.layered.safetensors: chunk 1 of layer 0 (2 bits) differs from its digest; it holds "
        f"L0/w.q; fetch bytes [{start}, {start + 65536}) again."
    )


def test_a_layer_of_one_chunk_whose_two_digests_differ_is_refused(data):
    changed = with_field(data, "layered.layers", lambda v: v[1].update(sha256="0" * 64))
    with pytest.raises(HeaderError, match="layer 1 is not that of its only chunk"):
        Header.parse(changed)


def test_a_layer_without_bytes_has_the_digest_of_nothing(tmp_path):
    content = big_content()
    content["layers"].append(LayerContent(8, []))
    content["weights"] = {"w": replace(content["weights"]["w"], pinned=8)}
    content["layers"][0].tensors[0] = TensorData("w.q", "U8", (8, 65536), bytes(8 * 65536))
    content["layers"][1] = LayerContent(3, [])
    write_artifact(tmp_path / "a", **content)
    data = (tmp_path / "a").read_bytes()
    assert Header.parse(data).layers[1].sha256 == hashlib.sha256().hexdigest()
    assert len(verify(source(data))) == 3
    changed = with_field(
        data, "layered.layers", lambda v: v[1].update(sha256="0" * 64), alignment=4096
    )
    with pytest.raises(HeaderError, match="layer 1 is not that of its only chunk"):
        Header.parse(changed)


def test_a_layer_of_chunks_whose_digest_contradicts_them_is_refused_by_verify(big):
    changed = with_field(
        big, "layered.layers", lambda v: v[0].update(sha256="0" * 64), alignment=512
    )
    assert contents(changed) == contents(big)  # the chunks fix every byte
    with pytest.raises(DigestError, match=r"layer 0 \(2 bits\).*contradicts itself"):
        verify(source(changed))


def test_a_layer_of_another_artifact_is_refused(data, tmp_path):
    other = build(tmp_path / "other", layers=layer_contents(seed=7))
    layer = Header.parse(data).layers[1].byte_range
    assert len(other) == len(data)
    mixed = data[: layer.start] + other[layer.start : layer.stop] + data[layer.stop :]
    with pytest.raises(DigestError, match="layer 1"):
        contents(mixed)


@pytest.mark.parametrize("appended", [b"\0", b"PK\x05\x06" + bytes(18), bytes(8)])
def test_appended_bytes_are_refused(data, appended):
    with pytest.raises(ArtifactError, match="appended"):
        ArtifactReader(source(data + appended))


def test_a_missing_part_read_as_zeros_is_refused(data):
    start = Header.parse(data).layers[2].byte_range.start
    with pytest.raises(DigestError, match="layer 2"):
        contents(data[:start] + bytes(len(data) - start))


def test_a_cut_at_or_beside_any_chunk_is_refused_unless_a_layer_ends_there(big):
    header = Header.parse(big)
    ends = {layer.byte_range.stop for layer in header.layers}
    cuts = {
        layer.chunk_range(number).stop + step
        for layer in header.layers
        for number in range(layer.num_chunks)
        for step in (-1, 0, 1)
    }
    assert len(cuts) > 10
    for cut in sorted(cuts - ends):
        with pytest.raises(ArtifactError, match=r"inside layer|appended"):
            ArtifactReader(source(big[:cut].ljust(cut, b"\0")))


def test_a_cut_file_that_is_extended_again_with_holes_is_refused(big, tmp_path):
    """Its size is right and its missing part reads as zeros, which stock safetensors accepts."""
    header = Header.parse(big)
    for cut in (header.layers[0].byte_range.start, header.layers[0].chunk_range(0).stop + 1):
        (tmp_path / "sparse").write_bytes(big[:cut])
        os.truncate(tmp_path / "sparse", len(big))
        safetensors.numpy.load_file(tmp_path / "sparse")
        with pytest.raises(DigestError, match="layer 0"):
            ArtifactReader(tmp_path / "sparse").read_layer(0)
        with pytest.raises(DigestError, match="layer 0"):
            verify(tmp_path / "sparse")


def place_of(data, name):
    header = Header.parse(data)
    return next(header.file_range(e) for e in header.tensors if e.name == name)


def test_rehashing_an_unchanged_file_keeps_it_readable(data):
    assert contents(rehashed(data)) == contents(data)


def test_padding_that_is_not_zero_is_refused_even_with_fitting_digests(data):
    pad = next(e.name for e in Header.parse(data).tensors if e.name.startswith("__pad__"))
    changed = rehashed(with_byte(data, place_of(data, pad).start, 1))
    with pytest.raises(ArtifactError, match=r"padding __pad__\.\d+ has a byte"):
        contents(changed)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("L0/conv.weight.scale", np.nan),
        ("L0/conv.weight.scale", np.inf),
        ("L0/fc.weight.scale", -1),
        ("L0/fc.step", 0),
        ("L1/fc.step", np.nan),
        ("L1/fc.weight.gain", np.inf),
        ("L2/fc.zero_point", np.nan),
    ],
)
def test_numbers_that_cannot_be_computed_with_are_refused_by_name(data, name, number):
    place = place_of(data, name)
    raw = np.array([number], "<f4").tobytes()
    changed = data[: place.start] + raw + data[place.start + 4 :]
    with pytest.raises(ArtifactError, match=f"tensor {name}"):
        contents(rehashed(changed))


def test_bits_after_the_last_weight_are_refused(data):
    place = place_of(data, "L1/fc.weight.q")  # 50 weights in 56 bits
    changed = rehashed(with_byte(data, place.stop - 1, data[place.stop - 1] | 0x80))
    with pytest.raises(ArtifactError, match="after its last weight"):
        contents(changed)


# --- fuzzing -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 8, 2**40, 2**53, "U8", "F32", "L0/x", "__pad__.7", "base", "signed"])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutate(value, draw):
    """``value`` with one thing changed, at any depth, JSON inside strings included."""
    if isinstance(value, str) and value[:1] in "[{" and value and draw(st.booleans()):
        return json.dumps(mutate(json.loads(value), draw))
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.sampled_from(["into", "into", "into", "drop", "rename"]))
        if action == "into":
            return {k: mutate(v, draw) if k == key else v for k, v in value.items()}
        if action == "drop":
            return {k: v for k, v in value.items() if k != key}
        name = draw(st.text(max_size=6) | st.sampled_from(sorted(value)))
        return {name if k == key else k: v for k, v in value.items()}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [mutate(v, draw) if i == index else v for i, v in enumerate(value)]
    if type(value) is int and draw(st.booleans()):
        return value + draw(st.sampled_from([-8, -1, 1, 8]))
    return draw(anything)


def judge(raw):
    """Only an ArtifactError, or a header that stock safetensors accepts as well."""
    try:
        header = Header.parse(raw)
    except ArtifactError:
        return False
    stock = safetensors.numpy.load(
        raw[: header.data_start] + bytes(header.file_bytes - header.data_start)
    )
    assert stock.keys() == {entry.name for entry in header.tensors}
    return True


@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_a_mutated_header_is_refused_or_stock_safetensors_accepts_it_too(data, draw):
    table, _ = table_of(data)
    judge(with_table(data, mutate(table, draw.draw)))


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 10**6), inserted=st.binary(max_size=4), dropped=st.integers(0, 4))
def test_mutated_bytes_are_refused_or_stock_safetensors_accepts_them_too(
    data, position, inserted, dropped
):
    start = Header.parse(data).data_start
    position %= start
    raw = bytearray(data[:start])
    raw[position : position + dropped] = inserted
    if position >= 8:  # keep the length honest, so that the text is looked at
        raw = raw.ljust(-(-len(raw) // 8) * 8, b" ")
        raw[:8] = (len(raw) - 8).to_bytes(8, "little")
    judge(bytes(raw))


@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(raw):
    with pytest.raises(ArtifactError):
        Header.parse(raw)
    with pytest.raises(ArtifactError):
        Header.parse(len(raw).to_bytes(8, "little") + raw)


def test_some_mutations_survive_so_the_comparison_with_stock_is_not_empty(data):
    assert judge(data)
    assert judge(with_field(data, "layered.model", lambda v: v.update(name="ø 🙂")))


# --- the code itself ---------------------------------------------------------------------------

PACKAGES = ("artifact", "codec", "delivery")
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "joblib", "torch", "eval", "exec", "setattr"}
FORBIDDEN |= {"__import__", "importlib", "compile"}


def names_in(tree):
    """Every name that code reads, calls or imports; of an attribute only the dunder ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_handles_bytes_can_run_what_it_reads(package):
    paths = sorted((Path(plyweight.artifact.__file__).parents[1] / package).glob("**/*.py"))
    assert paths
    for path in paths:
        used = set(names_in(ast.parse(path.read_text(encoding="utf-8"))))
        assert not used & FORBIDDEN, path.name
        # Attributes by a name that was read are how pickles and checkpoints were taken over.
        assert not used & {"__dict__", "__class__", "__globals__", "__subclasses__"}, path.name


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "setattr(a, b, c)",
        "a.__dict__.update(b)",
    ],
)
def test_the_test_above_would_see_it(code):
    used = set(names_in(ast.parse(code)))
    assert used & (FORBIDDEN | {"__dict__"})
