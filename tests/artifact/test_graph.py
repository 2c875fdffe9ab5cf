"""The graph: what it says comes back, and what breaks a rule is refused before it costs much."""

import hashlib
import json
import tracemalloc
import zlib

import pytest
from artifact.graphs import WIDTHS, graph
from hypothesis import given
from hypothesis import strategies as st

from plyweight.artifact import (
    Graph,
    Model,
    Module,
    Quantizer,
)
from plyweight.artifact.graph import Slot
from plyweight.artifact.graph_fields import MAX_GRAPH_BYTES
from plyweight.errors import ArtifactError, HeaderError, VersionError


def fields(of=None):
    """The JSON of a graph, and the bytes after it."""
    raw = zlib.decompress((of or graph()).to_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def packed(table, data=b"narrowwide"):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return zlib.compress(len(text).to_bytes(8, "little") + text + data)


def edited(edit):
    """A graph's bytes with its JSON changed by ``edit``."""
    table, data = fields()
    edit(table)
    return packed(table, data)


def test_what_a_graph_says_comes_back():
    assert Graph.from_bytes(graph().to_bytes()) == graph()
    assert Graph.from_bytes(memoryview(graph().to_bytes())) == graph()


def test_the_same_graph_gives_the_same_bytes_whatever_the_order_of_its_dictionaries():
    modules = {name: Module(param=name) for name in ("conv", "a", "b")}
    backwards = dict(reversed(modules.items()))
    assert graph(modules=modules).to_bytes() == graph(modules=backwards).to_bytes()


names = st.text("abc.é", min_size=1, max_size=5)


@given(
    params=st.dictionaries(names, names, max_size=4),
    steps=st.floats(2.0**-120, 1e30),
    zero_point=st.integers(0, 255),
    data=st.binary(min_size=1, max_size=50),
)
def test_any_graph_comes_back(params, steps, zero_point, data):
    one = graph(
        models=(Model(bit_widths=(1, 5), slots=(), data=data),),
        modules={f"m.{k}": Module(param=v, is_transposed=True) for k, v in params.items()},
        quantizers={
            "q": Quantizer(steps={1: steps, 5: 1.0}, zero_points={1: zero_point, 5: 0}),
            "r": Quantizer(activation=""),
        },
        tensors={},
    )
    assert Graph.from_bytes(one.to_bytes()) == one


GROUPED = {"fc": Module(param="fc.weight", bias="fc.bias", group_size=4, is_transposed=True)}


def test_a_graph_is_of_version_2_where_a_module_has_groups_and_of_1_elsewhere():
    table, _ = fields()
    assert table["version"] == 1
    assert table["modules"]["conv"].keys() == {"param", "bias", "norm", "input", "is_transposed"}
    both = graph(modules={**graph().modules, **GROUPED})
    table, _ = fields(both)
    assert table["version"] == 2
    assert [table["modules"][name]["group"] for name in ("conv", "fc")] == [None, 4]
    assert Graph.from_bytes(both.to_bytes()) == both


def test_a_graph_of_version_1_was_always_these_bytes():
    text = zlib.decompress(graph().to_bytes())
    assert hashlib.sha256(text).hexdigest() == (
        "d4a3a8d4239ece1d99522355708cec24d58429b6049bbec2c72933ea08b61cef"
    )


@pytest.mark.parametrize(
    ("version", "group", "message"),
    [
        (1, 4, "has a field 'group'"),
        (2, 0, "the group of module 'fc' of the graph is 0, but it must be an integer of 1"),
        (2, "4", "must be an integer of 1"),
        (2, True, "must be an integer of 1"),
    ],
)
def test_a_group_is_a_number_of_inputs_since_version_2(version, group, message):
    table, data = fields(graph(modules={**graph().modules, **GROUPED}))
    table["version"], table["modules"]["fc"]["group"] = version, group
    with pytest.raises(HeaderError, match=message):
        Graph.from_bytes(packed(table, data))
    del table["modules"]["fc"]["group"]
    if version == 2:
        with pytest.raises(HeaderError, match="lacks 'group'"):
            Graph.from_bytes(packed(table, data))


def test_a_bias_of_a_module_with_groups_has_no_scale():
    narrow = Model(bit_widths=(2,), slots=("fc.bias_scale",), data=b"m")
    with pytest.raises(HeaderError, match="none of its modules, quantizers and tensors fills it"):
        graph(models=(narrow,), modules={**graph().modules, **GROUPED})


def test_every_slot_says_what_fills_it():
    slots = graph().slots
    assert slots["conv.levels"] == Slot("module", "conv", "levels")
    assert slots["conv.in.highest"] == Slot("quantizer", "conv.in", "highest")
    assert slots["table"] == Slot("tensor", "fc.bias")
    assert len(slots) == 5 + 3 + 1


def test_a_bit_width_has_the_model_that_lists_it():
    assert [graph().model_for(b).data for b in WIDTHS] == [b"narrow", b"narrow", b"wide"]


# --- hostile bytes ------------------------------------------------------------------------------


def test_a_bomb_is_refused_without_taking_more_memory_than_the_limit():
    bomb = zlib.compressobj(9)
    block = bytes(2**20)
    data = b"".join(bomb.compress(block) for _ in range(128)) + bomb.flush()
    assert len(data) < 2**18
    tracemalloc.start()
    with pytest.raises(HeaderError, match=f"unpack to more than {MAX_GRAPH_BYTES}"):
        Graph.from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * MAX_GRAPH_BYTES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zlib stream ends too early"),
        (b"no zlib", "is no zlib stream"),
        (graph().to_bytes()[:-1], "ends too early"),
        (graph().to_bytes() + b"\0", "has bytes after it"),
        (graph().to_bytes() + graph().to_bytes(), "has bytes after it"),
        (zlib.compress(b"short"), "it starts with 8 bytes of length"),
        (zlib.compress((2**63).to_bytes(8, "little")), "claims 9223372036854775808 of JSON"),
        (zlib.compress((9).to_bytes(8, "little") + b"{}"), "2 bytes are there"),
        (packed(b"\xff"), "is no UTF-8"),
        (packed(b"[]"), "it is an object with a version"),
        (packed(b'{"version":1'), "brackets open"),
        (packed(b'{"version":1,"version":1}'), "the key 'version' twice"),
        (packed(b'{"version":1.0}'), "fractions are written as decimal strings"),
        (packed(fields()[0], b"narrowwid"), "9 bytes follow the text"),
        (packed(fields()[0], b"narrowwide!"), "11 bytes follow the text"),
    ],
)
def test_bytes_that_are_no_graph_are_refused_for_what_is_wrong_with_them(data, message):
    with pytest.raises(HeaderError, match=message):
        Graph.from_bytes(data)


@pytest.mark.parametrize("version", [0, 3, "1", True, None])
def test_another_version_is_refused_before_anything_else(version):
    with pytest.raises(VersionError, match="install a newer plyweight"):
        Graph.from_bytes(packed({"version": version, "something": "new"}))


def at(*path, value):
    """An edit: that value at that place."""

    def edit(table):
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return edit


EDITS = {
    "an unknown field": (at("more", value=1), "has a field 'more'"),
    "a field less": (lambda t: t.pop("tensors"), "lacks 'tensors'"),
    "no models": (at("models", value=[]), "10 bytes follow the text"),
    "models of another kind": (at("models", value={}), "they must be a list"),
    "a width twice": (at("models", 1, "bit_widths", value=[3]), "each bit-width has one model"),
    "widths that descend": (at("models", 0, "bit_widths", value=[3, 2]), "they must ascend"),
    "a width of 9": (at("models", 1, "bit_widths", value=[9]), "integer of 1 to 8"),
    "a length of 0": (at("models", 0, "num_bytes", value=0), "integer of 1 to"),
    "a negative length": (at("models", 0, "num_bytes", value=-1), "integers go from 0"),
    "a length of 2^53": (at("models", 0, "num_bytes", value=2**53), "integer of 1 to"),
    "a slot twice": (at("models", 0, "slots", value=["table"] * 2), "there twice"),
    "a slot of nobody": (at("models", 0, "slots", value=["conv.gain"]), "none of its modules"),
    "no input": (at("inputs", value=[]), "the graph's inputs are"),
    "an input twice": (lambda t: t["inputs"].append(t["inputs"][0]), "there twice"),
    "a dtype of text": (at("inputs", 0, "dtype", value="object"), "a graph knows float32"),
    "a dimension of 0": (at("outputs", 0, "shape", 1, value=0), "integer of 1 to"),
    "too many dimensions": (at("outputs", 0, "shape", value=[1] * 9), "at most 8 numbers"),
    "a name of nothing": (at("outputs", 0, "name", value=""), "names have 1 to 512"),
    "a name with a null": (at("outputs", 0, "name", value="a\0"), "control characters"),
    "a module less": (lambda t: t["modules"]["conv"].pop("bias"), "lacks 'bias'"),
    "a flag of 1": (at("modules", "conv", "is_transposed", value=1), "must be true or false"),
    "eps of text": (at("modules", "conv", "norm", "eps", value="inf"), "decimal string"),
    "eps of 1e400": (at("modules", "conv", "norm", "eps", value="1e400"), "decimal string"),
    "an input of nobody": (at("modules", "conv", "input", value="x"), "one of its quantizers"),
    "a step of 0": (at("quantizers", "conv.in", "steps", "2", value="0"), "positive float32"),
    "a negative step": (at("quantizers", "conv.in", "steps", "2", value="-1"), "decimal string"),
    "a step of 1e39": (at("quantizers", "conv.in", "steps", "2", value="1e39"), "positive float32"),
    "a zero point of 256": (at("quantizers", "conv.in", "zero_points", "2", value=256), "0 to 255"),
    "steps by no width": (at("quantizers", "conv.in", "steps", "02", value="1"), "by bit-width"),
    "two kinds of grid": (at("quantizers", "conv.in", "activation", value="fc"), "has a field"),
    "a slot of two": (at("tensors", "conv.scale", value="fc.bias"), "a name means one thing"),
    "a tensor of no name": (at("tensors", "table", value=3), "must be a text"),
}


@pytest.mark.parametrize("name", EDITS)
def test_json_that_breaks_a_rule_is_refused_by_name(name):
    edit, message = EDITS[name]
    with pytest.raises(HeaderError, match=message):
        Graph.from_bytes(edited(edit))


def test_a_graph_without_a_model_is_refused():
    table, _ = fields()
    with pytest.raises(HeaderError, match="the graph has no models"):
        Graph.from_bytes(packed(table | {"models": []}, b""))


def test_what_no_reader_would_accept_is_not_written():
    with pytest.raises(HeaderError, match="control characters"):
        graph(tensors={"table": "a\n"}).to_bytes()


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    for raw in (data, zlib.compress(data), packed(data)):
        with pytest.raises(ArtifactError):
            Graph.from_bytes(raw)


@given(at=st.integers(0, 10**4), byte=st.integers(0, 255))
def test_a_changed_byte_of_the_text_is_refused_or_gives_another_graph(at, byte):
    raw = bytearray(zlib.decompress(graph().to_bytes()))
    raw[at % len(raw)] = byte
    try:
        one = Graph.from_bytes(zlib.compress(bytes(raw)))
    except ArtifactError:
        return
    assert Graph.from_bytes(one.to_bytes()) == one


# --- the artifact it belongs to -----------------------------------------------------------------
