"""Header bombs: as much as fits into 16 MiB is judged, in time and memory that grow with it.

How long each takes is shown by `pytest --durations=0`; no test depends on it.
"""

import gc
import json
import sys
import tracemalloc

import pytest
from artifact.builders import MODEL, build, table_of, with_table, with_text

from plyweight.artifact import (
    Alignment,
    ByteRange,
    Header,
    Layer,
    LayeredWeight,
    TensorEntry,
    header_bytes,
)
from plyweight.errors import ArtifactError, HeaderError

MIB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bombs") / "tiny")


def full_header(num_tensors=199_000, name_length=14):
    """A header that is right, with as many tensors as are read in as many bytes as are read."""
    entries = [
        TensorEntry("L0/w.q", "U8", (2, 1), ByteRange(0, 2)),
        TensorEntry("__pad__.0", "U8", (6,), ByteRange(2, 8)),
        TensorEntry("L0/w.scale", "F32", (2,), ByteRange(8, 16)),
    ]
    for number in range(num_tensors):
        start = entries[-1].byte_range.stop
        name = f"L0/{number:0{name_length}d}"
        entries.append(TensorEntry(name, "F32", (2,), ByteRange(start, start + 8)))
    size = entries[-1].byte_range.stop
    num_chunks = -(-size // 65536)
    return Header(
        alignment=Alignment(8, 8),
        model=MODEL,
        weights={"w": LayeredWeight((2, 4))},
        activations={},
        layers=(Layer("base", 2, ByteRange(0, size), "0" * 64, 65536, (bytes(32),) * num_chunks),),
        tensors=tuple(entries),
    ).emit()


def crowded(data, num_tensors, *, name_length=70):
    """A header with so many empty tensors, one of which is out of place."""
    table, _ = table_of(data)
    table |= {
        f"L0/{i:0{name_length}d}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        for i in range(num_tensors)
    }
    return with_table(data, json.dumps(table, separators=(",", ":")))


def stuffed(data, key, frame, item, count):
    """A header one of whose fields has ``count`` items; ``%x`` in one stands for its number."""
    table, _ = table_of(data)
    items = ",".join(item % i if "%" in item else item for i in range(count))
    table["__metadata__"][key] = frame % items
    return with_table(data, table)


LABELS = ("layered.io", '{"labels":[%s]}')
ACTIVATION = '"%x":{"kind":"signed","bits":{"1":1}}'
WEIGHT = (
    '"%x":{"shape":[1],"group":null,"code":"sign-magnitude","decode":"half-cell","pinned":null}'
)
STUFFED = {
    "integers": (*LABELS, "0", 7_900_000, None),
    "texts": (*LABELS, '""', 3_200_000, None),
    "pairs of surrogates": (*LABELS, '"\\ud83d\\ude00"', 850_000, None),
    "lists": (*LABELS, "[[[[]]]]", 1_800_000, "7200002 lists and objects, but at most 1000000"),
    "objects": (*LABELS, '{"":{}}', 1_600_000, "3200002 lists and objects, but at most 1000000"),
    "metrics": ("layered.eval", '{"2":{%s}}', '"%x":"1"', 1_000_000, None),
    "activations": ("layered.activations", "{%s}", ACTIVATION, 310_000, "310000 activations"),
    "weights": ("layered.params", "{%s}", '"%x":0', 1_300_000, "1300000 layered weights"),
    "whole weights": ("layered.params", "{%s}", WEIGHT, 125_000, "must be U8 of shape"),
    "features": ("layered.requires", "[%s]", '""', 3_000_000, "requires ''"),
}


@pytest.mark.parametrize(("key", "frame", "item", "count", "words"), STUFFED.values(), ids=STUFFED)
def test_a_field_of_almost_sixteen_mebibytes_is_judged(data, key, frame, item, count, words):
    raw = stuffed(data, key, frame, item, count)
    assert 13 * MIB < header_bytes(raw) < 16 * MIB
    if words is None:
        assert Header.parse(raw).num_weights == Header.parse(data).num_weights
        return
    with pytest.raises(ArtifactError, match=words):
        Header.parse(raw)


def test_a_header_of_almost_sixteen_mebibytes_with_as_many_tensors_as_are_read_is_accepted():
    raw = full_header()
    assert 15 * MIB < len(raw) < 16 * MIB
    assert len(Header.parse(raw).tensors) == 199_003


def test_more_tensors_than_are_read_are_refused_before_one_of_them_is_looked_at(data):
    raw = crowded(data, 250_000, name_length=6)
    assert 14 * MIB < header_bytes(raw) < 16 * MIB
    with pytest.raises(HeaderError, match=r"the file has 2500\d\d tensors, but at most 200000"):
        Header.parse(raw)


@pytest.mark.parametrize("length", [16 * MIB + 1, 16 * MIB + 100_000])
def test_a_header_above_sixteen_mebibytes_is_refused_without_being_parsed(data, length):
    raw = with_text(data, b"{}".ljust(length, b" "), alignment=1)
    tracemalloc.start()
    with pytest.raises(HeaderError, match=f"the header claims {length} bytes"):
        Header.parse(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_the_work_on_a_header_grows_with_its_tensors_and_not_with_their_square(data):
    # Counted in calls, not in seconds: a busy machine changes nothing.
    def calls(num_tensors):
        raw, count = crowded(data, num_tensors), 0

        def counter(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(counter)
        try:
            with pytest.raises(HeaderError):
                Header.parse(raw)
        finally:
            sys.setprofile(before)
        return count

    few, many = calls(1000), calls(4000)
    assert few > 1000
    assert many < 4.5 * few


def test_each_tensor_of_a_header_takes_few_calls():
    # 2 s for 200,000 tensors are 10 us each; a call of Python takes about a tenth of one.
    raw, count = full_header(2000), 0

    def counter(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(counter)
    try:
        Header.parse(raw)
    finally:
        sys.setprofile(before)
    assert count < 25 * 2000


def test_the_search_for_cycles_is_on_again_after_a_header_whether_it_is_right_or_not(data):
    assert gc.isenabled()
    Header.parse(data)
    with pytest.raises(HeaderError):
        Header.parse(crowded(data, 1))
    assert gc.isenabled()
    gc.disable()
    try:
        Header.parse(data)
        assert not gc.isenabled()  # whoever turned it off does not find it on
    finally:
        gc.enable()
