"""Header: what it says, that it survives a round trip, and which headers are refused."""

import dataclasses
import hashlib
import itertools
import json

import pytest
from artifact.builders import (
    BIT_WIDTHS,
    IO,
    MODEL,
    WEIGHTS,
    build,
    table_of,
    with_field,
    with_table,
)
from hypothesis import given
from hypothesis import strategies as st

from plyweight.artifact import Activation, Header, LayeredWeight, header_bytes
from plyweight.artifact.header import REQUIRED_KEYS
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    HeaderError,
    TruncatedError,
    VersionError,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("header") / "tiny.layered.safetensors")


@pytest.fixture(scope="module")
def header(data):
    return Header.parse(data)


def test_a_header_says_what_was_packed(header):
    assert header.bit_widths == BIT_WIDTHS
    assert header.weights == WEIGHTS
    assert header.activations == {"fc": Activation("offset", {2: 3, 3: 4, 8: 8})}
    assert header.model == MODEL
    assert header.io == IO
    assert header.evaluation == {2: {"top1": "66.1"}, 8: {"top1": "71.25"}}


def test_what_is_emitted_parses_to_the_same_header(data, header):
    assert header.emit() == data[: header.data_start]
    assert Header.parse(header.emit()) == header


def test_the_artifact_id_is_the_digest_of_the_header_bytes(data, header):
    assert header.artifact_id == hashlib.sha256(data[: header.data_start]).hexdigest()


def test_what_follows_the_header_is_not_looked_at(data, header):
    assert Header.parse(data[: header.data_start] + b"garbage") == header
    with pytest.raises(TruncatedError, match="only"):
        Header.parse(data[: header.data_start - 1])
    assert header_bytes(data[:8]) == header.data_start


def test_prefixes_end_where_layers_do(data, header):
    assert header.prefix_bytes(8) == len(data) == header.file_bytes
    assert [header.prefix_bytes(b) for b in BIT_WIDTHS] == [
        layer.byte_range.stop for layer in header.layers
    ]
    assert header.layers_for(3) == header.layers[:2]
    assert sum((header.tensors_of(i) for i in range(3)), ()) == header.tensors


@pytest.mark.parametrize("bit_width", [1, 4, 9, True, "2"])
def test_a_bit_width_that_is_not_stored_is_refused_with_those_that_are(header, bit_width):
    with pytest.raises(BitWidthError, match=r"(stores|one of) 2, 3, 8"):
        header.prefix_bytes(bit_width)


def test_a_pinned_weight_has_its_planes_in_the_base_layer():
    pinned, free = LayeredWeight((4, 4), None, 4), LayeredWeight((4, 4), None, None)
    assert [pinned.planes_in(*step) for step in [(2, 0), (3, 2), (8, 3)]] == [4, 0, 4]
    assert [free.planes_in(*step) for step in [(2, 0), (3, 2), (8, 3)]] == [2, 1, 5]


def test_a_scale_per_group_counts_the_last_shorter_group():
    assert LayeredWeight((5, 10), 4).scale_shape == (5, 3)
    assert LayeredWeight((5, 10), None).scale_shape == (5,)


# --- versions ----------------------------------------------------------------------------------


def with_metadata(data, key, value):
    table, _ = table_of(data)
    table["__metadata__"][key] = value
    return with_table(data, table)


def test_a_rewritten_header_is_still_accepted_so_refusals_below_mean_something(data, header):
    table, _ = table_of(data)
    assert Header.parse(with_table(data, table)).tensors == header.tensors


@pytest.mark.parametrize("version", ["2", "1.1", "", "01"])
def test_another_version_is_refused_before_anything_else(data, version):
    changed = with_metadata(data, "layered.version", version)
    with pytest.raises(VersionError, match="install a newer plyweight"):
        Header.parse(with_metadata(changed, "layered.new", "x"))


def test_an_unknown_required_feature_is_refused(data):
    with pytest.raises(VersionError, match="'entropy'"):
        Header.parse(with_metadata(data, "layered.requires", '["entropy"]'))


def test_an_extension_may_be_ignored_and_is_kept(data):
    header = Header.parse(with_metadata(data, "layered.x-note", "hello"))
    assert header.extensions == {"layered.x-note": "hello"}
    assert Header.parse(header.emit()).extensions == header.extensions


@pytest.mark.parametrize("key", ["layered.note", "note", "layered.x", ""])
def test_any_other_key_is_refused(data, key):
    with pytest.raises(HeaderError, match="knows no such field"):
        Header.parse(with_metadata(data, key, "x"))


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_key_is_refused(data, key):
    table, _ = table_of(data)
    del table["__metadata__"][key]
    with pytest.raises(HeaderError):
        Header.parse(with_table(data, table))


# --- fields ------------------------------------------------------------------------------------


def first(value):
    return next(iter(value.values())) if isinstance(value, dict) else value[0]


FIELD_CHANGES = {
    "model: revision true": ("layered.model", lambda v: v.update(revision=True)),
    "model: name too long": ("layered.model", lambda v: v.update(name="é" * 257)),
    "model: control character": ("layered.model", lambda v: v.update(name="a\nb")),
    "model: config digest": ("layered.model", lambda v: v.update(config_sha256="AB" * 32)),
    "model: extra": ("layered.model", lambda v: v.update(extra=1)),
    "align: 24": ("layered.align", lambda v: v.update(layer=24)),
    "align: 4": ("layered.align", lambda v: v.update(tensor=4)),
    "align: tensor above layer": ("layered.align", lambda v: v.update(tensor=64)),
    "align: header does not fit": ("layered.align", lambda v: v.update(layer=65536)),
    "params: none": ("layered.params", lambda v: v.clear()),
    "params: code": ("layered.params", lambda v: first(v).update(code="offset")),
    "params: decode": ("layered.params", lambda v: first(v).update(decode="floor")),
    "params: pinned 9": ("layered.params", lambda v: first(v).update(pinned=9)),
    "params: pinned true": ("layered.params", lambda v: first(v).update(pinned=True)),
    "params: group 0": ("layered.params", lambda v: first(v).update(group=0)),
    "params: group above inputs": ("layered.params", lambda v: first(v).update(group=2**40)),
    "params: other shape": ("layered.params", lambda v: first(v).update(shape=[5, 10, 1, 9])),
    "params: zero dim": ("layered.params", lambda v: first(v).update(shape=[0, 2])),
    "params: scalar": ("layered.params", lambda v: first(v).update(shape=[])),
    "params: overflow": ("layered.params", lambda v: first(v).update(shape=[2**40] * 8)),
    "params: one more": ("layered.params", lambda v: v.update(other=first(v))),
    "params: one less": ("layered.params", lambda v: v.pop("fc.weight")),
    "activations: kind": ("layered.activations", lambda v: first(v).update(kind="relu")),
    "activations: kind list": ("layered.activations", lambda v: first(v).update(kind=[])),
    "activations: no width": ("layered.activations", lambda v: first(v).update(bits={})),
    "activations: width 02": ("layered.activations", lambda v: first(v).update(bits={"02": 2})),
    "activations: width missing": ("layered.activations", lambda v: first(v)["bits"].pop("3")),
    "activations: width 9": ("layered.activations", lambda v: first(v)["bits"].update({"2": 9})),
    "activations: signed": ("layered.activations", lambda v: first(v).update(kind="signed")),
    "activations: unknown": ("layered.activations", lambda v: v.update(other=first(v))),
    "layers: kind": ("layered.layers", lambda v: v[0].update(kind="plane")),
    "layers: second base": ("layered.layers", lambda v: v[1].update(kind="base")),
    "layers: alg": ("layered.layers", lambda v: v[0].update(alg="md5")),
    "layers: same width twice": ("layered.layers", lambda v: v[1].update(bits=2)),
    "layers: descending": ("layered.layers", lambda v: v[0].update(bits=7)),
    "layers: width 0": ("layered.layers", lambda v: v[0].update(bits=0)),
    "layers: width 9": ("layered.layers", lambda v: v[2].update(bits=9)),
    "layers: one byte more": ("layered.layers", lambda v: v[0].update(bytes=v[0]["bytes"] + 1)),
    "layers: other border": (
        "layered.layers",
        lambda v: (
            v[0].update(bytes=v[0]["bytes"] + 8),
            v[1].update(bytes=v[1]["bytes"] - 8),
            None,
        )[-1],
    ),
    "layers: 2^44+8 bytes": ("layered.layers", lambda v: v[0].update(bytes=2**44 + 8)),
    "layers: float": ("layered.layers", lambda v: v[0].update(bytes=240.0)),
    "layers: chunk 0": ("layered.layers", lambda v: v[0].update(chunk=0)),
    "layers: chunk too large": ("layered.layers", lambda v: v[0].update(chunk=2**27)),
    "layers: short digest": ("layered.layers", lambda v: v[0].update(sha256="00")),
    "layers: chunks missing": ("layered.layers", lambda v: v[0].update(chunks="")),
    "layers: chunks no base64": ("layered.layers", lambda v: v[0].update(chunks="*" * 44)),
    "layers: loose base64": ("layered.layers", lambda v: v[0].update(chunks="A" * 42 + "B=")),
    "layers: none": ("layered.layers", lambda v: v.clear()),
    "layers: 33": ("layered.layers", lambda v: v.extend([v[0]] * 30)),
    "layers: last missing": ("layered.layers", lambda v: v.pop()),
    "eval: float": ("layered.eval", lambda v: v["2"].update(top1=66.1)),
    "eval: no decimal": ("layered.eval", lambda v: v["2"].update(top1="nan")),
    "eval: width not stored": ("layered.eval", lambda v: v.update({"5": {}})),
    "io: unknown": ("layered.io", lambda v: v.update(other=1)),
    "io: too deep": ("layered.io", lambda v: v.update(labels=[[[[[[1]]]]]])),
    "requires: object": ("layered.requires", lambda v: {}),
}


@pytest.mark.parametrize(("key", "change"), FIELD_CHANGES.values(), ids=FIELD_CHANGES)
def test_a_field_that_breaks_a_rule_is_refused(data, key, change):
    with pytest.raises(HeaderError):
        Header.parse(with_field(data, key, change))


# --- tensors -----------------------------------------------------------------------------------


def renamed(old, new):
    def change(table):
        items = [(new if name == old else name, entry) for name, entry in table.items()]
        table.clear()
        table.update(items)

    return change


TENSOR_CHANGES = {
    "planes missing": renamed("L0/conv.weight.q", "L0/conv.weight.r"),
    "scale missing": renamed("L0/fc.weight.scale", "L0/fc.weight.scal"),
    "step missing": renamed("L0/fc.step", "L0/fc.stop"),
    "zero point missing": renamed("L0/fc.zero_point", "L0/fc.zero"),
    "scale in a later layer": renamed("L1/bn.bias", "L1/conv.weight.scale"),
    "gain without a new bit-width": renamed("L1/bn.bias", "L1/conv.weight.gain"),
    "plain tensor that L0 lacks": renamed("L1/bn.bias", "L1/bn.bios"),
    "plain tensor of another shape": renamed("L1/bn.bias", "L1/fc.bias"),
    "the weight itself": renamed("L0/fc.bias", "L0/fc.weight"),
    "layer that is not there": renamed("L2/bn.bias", "L3/bn.bias"),
    "layer 01": renamed("L1/bn.bias", "L01/bn.bias"),
    "no layer": renamed("L0/fc.bias", "fc.bias"),
    "path": renamed("L0/fc.bias", "../../etc/passwd"),
    "empty name": renamed("L0/fc.bias", "L0/"),
    "control character": renamed("L0/fc.bias", "L0/fc\x00bias"),
    "name of 513 bytes": renamed("L0/fc.bias", "L0/" + "x" * 510),
    "reserved name": renamed("L0/fc.bias", "L0/__pad__.9"),
    "graph of floats": renamed("L0/fc.bias", "L0/__graph__"),
    "pad 01": renamed("__pad__.0", "__pad__.00"),
    "tensor of another layer": renamed("L1/bn.bias", "L0/bn.bias2"),
    "dtype": lambda t: t["L0/fc.bias"].update(dtype="F8_E4M3"),
    "dtype of the same size": lambda t: t["L0/fc.weight.scale"].update(dtype="I32"),
    "dtype of a list": lambda t: t["L0/fc.bias"].update(dtype=["F32"]),
    "field too many": lambda t: t["L0/fc.bias"].update(strides=[1]),
    "field missing": lambda t: t["L0/fc.bias"].pop("shape"),
    "rank 9": lambda t: t["L0/fc.bias"].update(shape=[5] + [1] * 8),
    "dim true": lambda t: t["L0/bn.num_batches_tracked"].update(shape=[True]),
    "dim overflow": lambda t: t["L0/fc.bias"].update(shape=[2**62, 4]),
    "dim product overflow": lambda t: t["L0/empty"].update(shape=[2**40, 2**40, 0]),
    "scale of another shape": lambda t: t["L0/fc.weight.scale"].update(shape=[3, 5]),
    "planes of another shape": lambda t: t["L0/fc.weight.q"].update(shape=[7, 2]),
    "gain of another shape": lambda t: t["L1/fc.weight.gain"].update(shape=[]),
    "three offsets": lambda t: t["L0/fc.bias"]["data_offsets"].append(0),
    "offset true": lambda t: t["L0/conv.weight.q"].update(data_offsets=[False, 56]),
    "pad of bools": lambda t: t["__pad__.0"].update(dtype="BOOL"),
    "pad of rank 2": lambda t: t["__pad__.0"]["shape"].append(1),
    "none": lambda t: [t.pop(k) for k in list(t) if k != "__metadata__"],
}


@pytest.mark.parametrize("change", TENSOR_CHANGES.values(), ids=TENSOR_CHANGES)
def test_a_tensor_that_breaks_a_rule_is_refused(data, change):
    table, _ = table_of(data)
    change(table)
    with pytest.raises(HeaderError):
        Header.parse(with_table(data, table))


def test_every_offset_moved_by_one_is_refused(data):
    table, _ = table_of(data)
    for name in [name for name in table if name != "__metadata__"]:
        for which in (0, 1):
            for step in (-1, 1, 8):
                changed = json.loads(json.dumps(table))
                changed[name]["data_offsets"][which] += step
                with pytest.raises(HeaderError):
                    Header.parse(with_table(data, changed))


@given(draw=st.data())
def test_tensors_in_any_other_order_are_refused(data, draw):
    table, _ = table_of(data)
    # A tensor without bytes leaves no hole wherever it stands.
    names = [name for name in table if name not in ("__metadata__", "L0/empty")]
    order = draw.draw(st.permutations(names).filter(lambda order: order != names))
    with pytest.raises(HeaderError):
        Header.parse(
            with_table(data, {name: table[name] for name in ["__metadata__", *order, "L0/empty"]})
        )


def test_two_neighbours_that_are_swapped_are_refused(data):
    table, _ = table_of(data)
    names = list(table)
    for index in range(1, len(names) - 1):
        swapped = [*names[:index], names[index + 1], names[index], *names[index + 2 :]]
        if "empty" in names[index] + names[index + 1]:
            continue  # a tensor without bytes leaves no hole
        with pytest.raises(HeaderError):
            Header.parse(with_table(data, {name: table[name] for name in swapped}))


OVERFLOWS = {
    "2^62 x 4": [2**62, 4],
    "2^63-1 x 2": [2**63 - 1, 2],
    "2^32 x 2^32": [2**32, 2**32],  # 0 in 64 bits
    "2^40 x 2^24 x 1": [2**40, 2**24, 1],
    "0 x 2^40 x 2^40": [0, 2**40, 2**40],
    "2^40 x 2^40 x 0": [2**40, 2**40, 0],
    "0": [0],
}


@pytest.mark.parametrize("shape", OVERFLOWS.values(), ids=OVERFLOWS)
def test_dimensions_whose_product_overflows_or_is_zero_are_refused(data, shape):
    table, _ = table_of(data)
    for name in ("L0/fc.weight.q", "L0/fc.weight.scale", "L0/fc.bias"):
        changed = json.loads(json.dumps(table))
        changed[name]["shape"] = shape
        with pytest.raises(HeaderError):
            Header.parse(with_table(data, changed))
    with pytest.raises(HeaderError):
        Header.parse(
            with_field(data, "layered.params", lambda v: v["fc.weight"].update(shape=shape))
        )


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_whose_shape_or_group_changes_must_still_fit_its_planes_and_scales(data, name):
    true = WEIGHTS[name]
    shapes = [
        (*true.shape[:axis], size, *true.shape[axis + 1 :])
        for axis, dim in enumerate(true.shape)
        for size in {1, dim - 1, dim + 1, 2 * dim} - {dim}
    ] + [true.shape[::-1], true.shape[:-1], (*true.shape, 2)]
    groups = [true.group_size, 1, 2, 3, 5]
    fitting = refused = 0
    for shape, group in itertools.product([true.shape, *shapes], groups):
        changed = LayeredWeight(shape, group, true.pinned)
        raw = with_field(
            data, "layered.params", lambda v, s=shape, g=group: v[name].update(shape=s, group=g)
        )
        if (
            len(shape) > 1
            and 1 <= (group or 1) <= shape[1]
            and changed.plane_bytes == true.plane_bytes
            and changed.scale_shape == true.scale_shape
        ):
            assert Header.parse(raw).weights[name] == changed
            fitting += 1
        else:
            with pytest.raises(HeaderError):
                Header.parse(raw)
            refused += 1
    assert fitting
    assert refused > 20


def test_every_dimension_of_a_tensor_with_a_meaning_is_held_to_it(data):
    table, _ = table_of(data)
    leaves = ("q", "scale", "gain", "step", "zero_point")
    names = [name for name in table if name.rpartition(".")[2] in leaves]
    assert len(names) == 14
    for name in names:
        shape = table[name]["shape"]
        for other in ([*shape, 1], [1, *shape], shape[::-1], shape[:-1]):
            if other == shape:
                continue
            changed = json.loads(json.dumps(table))
            changed[name]["shape"] = other
            with pytest.raises(HeaderError):
                Header.parse(with_table(data, changed))


def test_every_message_is_one_short_line(data):
    for key, change in FIELD_CHANGES.values():
        with pytest.raises(ArtifactError) as caught:
            Header.parse(with_field(data, key, change))
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_a_header_is_frozen(header):
    with pytest.raises(dataclasses.FrozenInstanceError):
        header.data_start = 0
