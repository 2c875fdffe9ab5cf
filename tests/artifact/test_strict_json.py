"""The text of a header: its length, and what JSON allows and this format does not."""

import json
import re
import tracemalloc

import pytest
from artifact.builders import build, table_of, with_field, with_table, with_text

from plyweight.artifact import Header
from plyweight.errors import HeaderError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("text") / "tiny")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 16 * 2**20 + 1, 0, 7])
def test_a_hostile_length_is_refused_before_memory_is_taken(length):
    raw = length.to_bytes(8, "little") + b"{}"
    tracemalloc.start()
    with pytest.raises(HeaderError, match="the header claims"):
        Header.parse(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


DEEP = "nests deeper than 6 or leaves brackets open"
BAD_TEXTS = {
    "nesting bomb": (b'{"a":' + b"[" * 10**6, r"ends with b'\['"),
    "nesting bomb that ends well": (b'{"a":' + b"[" * 10**6 + b"}", DEEP),
    "closed nesting bomb": (b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", DEEP),
    "seven levels": (b'{"a":{"a":{"a":{"a":{"a":{"a":{}}}}}}}', DEEP),
    "unclosed object": (b'{"a":{}', DEEP),
    "digit bomb": (b'{"a":' + b"9" * 10**6 + b"}", "has the number '9999"),
    "NaN": (b'{"a":NaN}', "has the number 'NaN'"),
    "Infinity": (b'{"a":-Infinity}', "has the number '-Infinity'"),
    "float": (b'{"a":1.0}', r"has the number '1\.0'"),
    "exponent": (b'{"a":1E5}', "has the number '1E5'"),
    "1e400": (b'{"a":1e400}', "has the number '1e400'"),
    "negative": (b'{"a":-1}', "has the number '-1'"),
    "negative zero": (b'{"a":-0}', "has the number '-0'"),
    "above 2^53": (b'{"a":9007199254740993}', "has the number '9007199254740993'"),
    "leading space": (b' {"a":1}', "starts with b' '"),
    "byte order mark": (b'\xef\xbb\xbf{"a":1}', "starts with"),
    "array": (b'["a"]   ', "starts with b'\\['"),
    "padded with newlines": (b'{"a":1}\n\n', "ends with"),
    "two objects": (b'{"a":1}{"b":1}', "is no JSON"),
    "no UTF-8": (b'{"\xff":1}', "is no UTF-8"),
    "lone surrogate": (b'{"\\ud800":1}', "half a surrogate pair"),
    "unclosed string": (b'{"a' + b'\\"' * 10**6 + b"}", DEEP),
    "same key twice": (b'{"a":1,"a":1}', "has the key 'a' twice"),
    "same key twice, once escaped": (b'{"a":1,"\\u0061":1}', "has the key 'a' twice"),
    "no metadata": (b'{"a":{}}', "__metadata__ is None"),
    "metadata is no object": (b'{"__metadata__":[1,2]}', "__metadata__ is"),
    "metadata of another tool": (b'{"__metadata__":{"format":"pt"}}', "no 'layered.version'"),
}


@pytest.mark.parametrize(("text", "words"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_text_that_is_no_header_is_refused_for_what_is_wrong_with_it(data, text, words):
    with pytest.raises(HeaderError, match=words):
        Header.parse(with_text(data, text))


BAD_NUMBERS = ["NaN", "-Infinity", "1.0", "1e400", "-1", "9007199254740993", "9" * 10**6]


@pytest.mark.parametrize("number", BAD_NUMBERS, ids=[n[:20] for n in BAD_NUMBERS])
@pytest.mark.parametrize("key", ["layered.model", "layered.layers", "layered.io"])
def test_numbers_that_are_no_whole_ones_to_2_to_the_53_are_refused_inside_fields(data, key, number):
    table, _ = table_of(data)
    text = table["__metadata__"][key]
    table["__metadata__"][key] = re.sub(r'":(\[?)\d+', rf'":\g<1>{number}', text, count=1)
    assert number in table["__metadata__"][key]
    with pytest.raises(HeaderError, match=f"{key} has the number '{number[:20]}"):
        Header.parse(with_table(data, table))


def test_whole_numbers_are_read_up_to_2_to_the_53(data):
    changed = with_field(data, "layered.io", lambda v: v.update(labels=[2**53, 0, 10**15]))
    assert Header.parse(changed).io["labels"] == [2**53, 0, 10**15]


@pytest.mark.parametrize("key", ["layered.params", "layered.layers", "layered.io"])
def test_a_key_given_twice_inside_an_embedded_object_is_refused(data, key):
    table, _ = table_of(data)
    text = table["__metadata__"][key]
    table["__metadata__"][key] = text.replace('{"', '{"bits":1,"bits":1,"', 1)
    with pytest.raises(HeaderError, match="twice"):
        Header.parse(with_table(data, table))


@pytest.mark.parametrize("shape", [[5], [1, 5]], ids=["same", "other"])
def test_a_tensor_given_twice_is_refused_whether_its_shape_is_the_same_or_not(data, shape):
    table, _ = table_of(data)
    entry = json.dumps(table["L0/fc.bias"] | {"shape": shape})
    text = json.dumps(table)[:-1] + f', "L0/fc.bias": {entry}}}'
    with pytest.raises(HeaderError, match=r"'L0/fc\.bias' twice"):
        Header.parse(with_table(data, text))
