"""Reader: prefixes read, anything else is refused; nothing is read before it is asked for."""

import gc
import weakref

import numpy as np
import pytest
from artifact.builders import BIT_WIDTHS, WEIGHTS, build, planes_of, source

from plyweight.artifact import (
    ArtifactReader,
    ByteRange,
    FileSource,
    MemorySource,
    open_source,
    verify,
)
from plyweight.codec import codes_at, from_planes
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    DeliveryError,
    RangeError,
    SourceError,
    TruncatedError,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "tiny.layered.safetensors"
    build(path)
    return path


@pytest.fixture(scope="module")
def data(path):
    return path.read_bytes()


def test_opening_reads_the_header_and_not_one_byte_more(data):
    memory = source(data)
    reader = ArtifactReader(memory)
    assert memory.reads == [ByteRange(0, 8), ByteRange(8, reader.header.data_start)]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_cut_at_a_layers_end_reads_and_gives_the_same_layers(data, num_layers):
    whole = ArtifactReader(source(data))
    stop = whole.header.layers[num_layers - 1].byte_range.stop
    reader = ArtifactReader(source(data[:stop]))
    assert reader.held_bit_widths == BIT_WIDTHS[:num_layers]
    assert reader.header == whole.header
    assert reader.verify() == whole.header.layers[:num_layers]
    for index in range(num_layers):
        assert reader.read_layer(index).keys() == whole.read_layer(index).keys()


def test_a_cut_at_any_other_length_is_refused(data):
    header = ArtifactReader(source(data)).header
    ends = {layer.byte_range.stop for layer in header.layers}
    near = {edge + d for edge in (*ends, header.data_start, 8) for d in (-8, -1, 0, 1, 8)}
    lengths = near | set(range(0, len(data), 11)) | set(range(header.data_start, len(data)))
    refused = 0
    for length in sorted(lengths - ends):
        if length < len(data):
            with pytest.raises(TruncatedError):
                ArtifactReader(source(data[:length]))
        else:
            with pytest.raises(ArtifactError, match="appended"):
                ArtifactReader(source(data + bytes(length - len(data))))
        refused += 1
    assert refused > 500


def test_a_cut_is_explained_by_layer_bit_width_tensor_and_remedy(data):
    header = ArtifactReader(source(data)).header
    start = header.layers[1].byte_range.start
    with pytest.raises(TruncatedError) as caught:
        ArtifactReader(source(data[: start + 1]))
    assert str(caught.value) == (
        f"tiny.layered.safetensors: it ends at byte {start + 1}, inside layer 1 (3 bits) at "
        f"tensor L1/fc.weight.q; fetch it up to byte {header.prefix_bytes(3)}, "
        f"or keep {start} bytes for 2 bits."
    )


def test_verify_checks_a_file_by_its_path(path):
    assert verify(path) == ArtifactReader(path).header.layers


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_reading_a_bit_width_reads_no_byte_beyond_its_layer(data, bit_width):
    memory = source(data)
    reader = ArtifactReader(memory)
    for index in range(reader.header.layer_index(bit_width) + 1):
        reader.read_layer(index)
    assert max(r.stop for r in memory.reads) == reader.header.prefix_bytes(bit_width)


def test_an_upgrade_reads_only_the_missing_layers(data):
    memory = source(data)
    reader = ArtifactReader(memory)
    reader.read_layer(0)
    memory.reads.clear()
    reader.read_layer(1)
    assert memory.reads == [reader.header.layers[1].byte_range]


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_the_planes_of_a_prefix_are_the_codes_of_its_bit_width(path, bit_width):
    reader = ArtifactReader(path)
    layers = [reader.read_layer(i) for i in range(reader.header.layer_index(bit_width) + 1)]
    for name, weight in WEIGHTS.items():
        rows = [
            row for layer in layers if f"{name}.q" in layer for row in layer[f"{name}.q"].numpy()
        ]
        codes = from_planes(planes_of(name), weight.shape)
        own = weight.width_at(bit_width)
        assert len(rows) == own
        assert np.array_equal(from_planes(rows, weight.shape), codes_at(codes, own))


def test_tensors_are_aligned_views_of_one_buffer_which_goes_with_them(path):
    tensors = ArtifactReader(path).read_layer(0)
    arrays = {name: view.numpy() for name, view in tensors.items()}
    assert arrays["bn.num_batches_tracked"] == 0
    assert arrays["fc.bias"].dtype == np.float32
    assert arrays["fc.bias"].flags.aligned
    assert len({id(view.data.obj) for view in tensors.values()}) == 1
    last = weakref.ref(tensors["fc.bias"].data)
    del tensors, arrays
    gc.collect()
    assert last() is None


def test_a_layer_that_is_not_held_says_what_to_fetch(data):
    header = ArtifactReader(source(data)).header
    stop = header.prefix_bytes(3)
    reader = ArtifactReader(source(data[:stop]))
    with pytest.raises(BitWidthError, match=rf"stores 2, 3\..*fetch bytes {stop} to {len(data)}"):
        reader.read_layer(2)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_layer_that_does_not_exist_is_an_index_error(data, index):
    with pytest.raises(IndexError, match="layers 0 to 2"):
        ArtifactReader(source(data)).read_layer(index)


# --- sources -----------------------------------------------------------------------------------


def test_a_file_and_memory_give_the_same_bytes(path, data):
    file = FileSource(path)
    assert file.size() == len(data)
    assert file.name == str(path)
    for byte_range in (ByteRange(0, 8), ByteRange(5, 5), ByteRange(100, len(data))):
        assert file.read(byte_range) == MemorySource(data).read(byte_range)
        assert isinstance(file.read(byte_range), bytearray)
        assert file.read_view(byte_range) == file.read(byte_range)
        assert not file.read_view(byte_range).readonly


@pytest.mark.parametrize("byte_range", [(0, 11), (11, 12), (-1, 3), (5, 4)])
def test_bytes_that_are_not_there_are_refused(tmp_path, byte_range):
    (tmp_path / "ten").write_bytes(bytes(10))
    for ten in (FileSource(tmp_path / "ten"), MemorySource(bytes(10))):
        with pytest.raises(RangeError, match="has 10 bytes"):
            ten.read(ByteRange(*byte_range))
    with pytest.raises(RangeError, match="has 10 bytes"):
        FileSource(tmp_path / "ten").read_view(ByteRange(*byte_range))


def test_a_path_that_is_no_file_is_refused_in_words(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        FileSource(tmp_path / "missing")
    with pytest.raises(SourceError, match="is a directory"):
        FileSource(tmp_path)
    with pytest.raises(SourceError, match="not a regular file"):
        FileSource("/dev/null")
    with pytest.raises(SourceError, match="null"):
        FileSource("a\0b")


def test_a_file_that_shrinks_or_closes_under_the_reader_is_an_error_not_zeros(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    file = FileSource(tmp_path / "a")
    (tmp_path / "a").write_bytes(bytes(5))
    with pytest.raises(SourceError, match="lost bytes"):
        file.read(ByteRange(0, 10))
    file.close()
    with pytest.raises(SourceError, match="open it again"):
        file.read(ByteRange(0, 1))


def test_a_file_replaced_meanwhile_does_not_mix_with_the_one_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    file = FileSource(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(tmp_path / "a")
    assert file.read(ByteRange(0, 3)) == b"old"


def test_open_source_takes_paths_and_sources_and_refuses_urls(path, data):
    memory = MemorySource(data)
    assert open_source(memory) is memory
    assert open_source(str(path)).size() == len(data)
    with pytest.raises(SourceError, match="is a URL"):
        open_source("https://example.org/a.safetensors")
    assert issubclass(SourceError, DeliveryError)


def test_what_is_neither_a_path_nor_a_source_is_refused():
    for wrong in (5, None, b"bytes"):
        with pytest.raises(SourceError, match="give the path of an artifact"):
            ArtifactReader(wrong)
