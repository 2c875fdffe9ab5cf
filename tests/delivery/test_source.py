"""Sources: what is said of all of them."""

import numpy as np
import pytest
from delivery.fakes import FakeSource
from delivery.servers import hostile

from plyweight.delivery.source import open_file, read_small
from plyweight.errors import SourceError, TransferError

DATA = np.random.default_rng(7).bytes(10_000)


def test_a_small_file_that_comes_in_short_replies_is_read_to_its_end():
    with hostile(DATA, "short") as server:
        source = open_file(server.url)
        assert read_small(source, 20_000) == DATA
        assert len(server.requests) > 2
        with pytest.raises(SourceError, match="more than the 9999 bytes"):
            read_small(source, 9_999)
        assert read_small(source, 10_000) == DATA
        source.close()


def test_a_small_file_that_comes_whole_the_second_time_is_read_once():
    source = FakeSource(DATA)
    source.replies[0] = lambda body, _: body[:3000]
    source.before = lambda source, number: setattr(source, "ranges", number == 0)
    assert read_small(source, 20_000) == DATA
    assert len(source.log) == 2


def test_a_source_that_sends_nothing_more_is_asked_no_more():
    source = FakeSource(DATA)
    source.before = lambda source, number: source.replies.update({number: lambda body, _: b""})
    with pytest.raises(TransferError, match="sent 0 of 10000 bytes"):
        read_small(source, 20_000)
