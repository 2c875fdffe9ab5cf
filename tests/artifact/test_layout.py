"""Layout: ranges, alignment, and what padding may cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plyweight.artifact import Alignment, ByteRange, align_up, choose_alignment
from plyweight.artifact.layout import ALIGNMENTS, place

sizes = st.lists(st.lists(st.integers(0, 100_000), min_size=1, max_size=6), min_size=1, max_size=5)


def test_a_byte_range_leaves_its_stop_out():
    assert ByteRange(3, 7).num_bytes == 4
    assert ByteRange(3, 7).shifted(10) == ByteRange(13, 17)
    assert str(ByteRange(3, 7)) == "[3, 7)"


@pytest.mark.parametrize(("offset", "aligned"), [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_align_up_goes_to_the_next_multiple_and_never_past_it(offset, aligned):
    assert align_up(offset, 8) == aligned


@given(layer_sizes=sizes, alignment=st.sampled_from(ALIGNMENTS))
def test_places_keep_sizes_and_order_and_are_aligned(layer_sizes, alignment):
    places = place(layer_sizes, alignment)
    stop = 0
    for layer, wanted in zip(places, layer_sizes, strict=True):
        assert [r.num_bytes for r in layer] == wanted
        assert align_up(stop, alignment.layer) <= layer[0].start
        for byte_range in layer:
            assert byte_range.start % alignment.tensor == 0
            assert 0 <= byte_range.start - stop < alignment.layer + alignment.tensor
            stop = byte_range.stop


@given(layer_sizes=sizes)
def test_the_chosen_alignment_pads_at_most_half_a_percent_or_is_the_smallest(layer_sizes):
    chosen = choose_alignment(layer_sizes)
    payload = sum(map(sum, layer_sizes))

    def padding(alignment):
        return align_up(place(layer_sizes, alignment)[-1][-1].stop, alignment.layer) - payload

    assert chosen == ALIGNMENTS[-1] or padding(chosen) <= 0.005 * payload
    for larger in ALIGNMENTS[: ALIGNMENTS.index(chosen)]:
        assert padding(larger) > 0.005 * payload


def test_large_layers_are_aligned_to_pages_and_tiny_ones_to_eight_bytes():
    assert choose_alignment([[4_000_000, 900], [2_000_000]]) == Alignment(4096, 64)
    assert choose_alignment([[60, 4], [30]]) == Alignment(8, 8)
