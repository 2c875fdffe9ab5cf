"""fetch: from an address to a cache or a file, within a budget, and only if it is trusted."""

import pytest
from artifact.builders import MODEL, big_content, build, layer_contents
from delivery.servers import NAME, hostile, plain_server
from delivery.signers import id_of, keys, signed

from plyweight.artifact import ArtifactReader, Header, ModelInfo, write_artifact
from plyweight.delivery.fetch import evict, fetch, fetch_header, is_remote
from plyweight.errors import (
    BitWidthError,
    BudgetError,
    LayeringError,
    SourceError,
    TrustError,
    TrustWarning,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fetch") / "tiny")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("fetch") / "big"
    write_artifact(path, **big_content(shape=(4096, 2048)))
    return path.read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWEIGHT_CACHE", str(tmp_path / "cache"))


# --- where to --------------------------------------------------------------------------------


def test_the_cache_holds_what_was_fetched_and_a_second_call_moves_nothing(data):
    with hostile(data) as server:
        first = fetch(server.url, bit_width=3, artifact_id=id_of(data))
        num_requests = len(server.requests)
        second = fetch(server.url, bit_width=3, artifact_id=id_of(data))
        assert len(server.requests) == num_requests
    assert first.transfer.received_bytes > 0
    assert second.transfer.requests == second.transfer.received_bytes == 0
    assert first.path is None
    assert ArtifactReader(second.artifact).held_bit_widths == (2, 3)


def test_a_file_at_a_path_is_the_prefix_and_is_extended_by_what_is_missing(data, tmp_path):
    path = tmp_path / "net.layered.safetensors"
    header = Header.parse(data)
    with hostile(data) as server:
        fetched = fetch(server.url, path, bit_width=2, artifact_id=header.artifact_id)
        assert fetched.path == path
        assert path.read_bytes() == data[: header.prefix_bytes(2)]
        fetch(server.url, path, artifact_id=header.artifact_id)
    assert path.read_bytes() == data


def test_a_local_path_can_be_fetched_too(data, tmp_path):
    (tmp_path / "net").write_bytes(data)
    fetched = fetch(tmp_path / "net", bit_width=2)
    assert ArtifactReader(fetched.artifact).held_bit_widths == (2,)


# --- how much --------------------------------------------------------------------------------


def test_the_widest_that_fits_is_fetched_and_the_reason_said(data):
    header = Header.parse(data)
    with hostile(data) as server:
        fetched = fetch(
            server.url, max_bytes=header.prefix_bytes(3), artifact_id=header.artifact_id
        )
    assert fetched.bit_width == 3
    assert fetched.reason.startswith("3 bits, the widest that fits: 8 need")


def test_nothing_is_kept_where_not_even_the_base_fits(data, tmp_path):
    with hostile(data) as server, pytest.raises(BudgetError, match="not even 2 bits"):
        fetch(server.url, tmp_path / "net", max_bytes=10, artifact_id=id_of(data))
    assert not (tmp_path / "net").exists()


def test_a_bit_width_that_is_not_stored_is_refused(data):
    with hostile(data) as server, pytest.raises(BitWidthError, match="4 bits were asked for"):
        fetch(server.url, bit_width=4, artifact_id=id_of(data))


def test_a_deadline_is_judged_by_the_rate_that_the_link_has(big):
    header = Header.parse(big)
    assert header.prefix_bytes(2) > 2 * 2**20
    with hostile(big, pace_s=0.02) as server:  # about 3 MB/s
        with pytest.raises(BudgetError, match="MB/s of this link"):
            fetch(server.url, deadline_s=0.2, artifact_id=header.artifact_id)
        patient = fetch(server.url, deadline_s=600, artifact_id=header.artifact_id)
    assert patient.bit_width == 3


def test_the_link_is_measured_without_a_request_of_its_own(big):
    with hostile(big) as server:
        plain = fetch(server.url, "plain", bit_width=3, artifact_id=id_of(big), cache="a")
        num_requests = len(server.requests)
        measured = fetch(server.url, "timed", deadline_s=600, artifact_id=id_of(big), cache="b")
        assert len(server.requests) == 2 * num_requests
    assert measured.transfer.received_bytes == plain.transfer.received_bytes


@pytest.mark.parametrize("num_failures", [0, 1])
def test_an_upgrade_measures_the_link_on_bytes_that_it_keeps(big, num_failures, monkeypatch):
    monkeypatch.setattr("plyweight.delivery.retry.FIRST_S", 0.0)
    header = Header.parse(big)
    failing = set()
    with hostile(big, "busy", when=failing.__contains__, retry_after="0") as server:
        fetch(server.url, bit_width=2, artifact_id=header.artifact_id)
        sent, asked = server.sent, len(server.requests)
        failing.update(range(asked, asked + num_failures))
        upgraded = fetch(server.url, deadline_s=600, artifact_id=header.artifact_id)
        asked = len(server.requests) - asked
        sent = server.sent - sent - num_failures * len(b"busy")
    assert upgraded.bit_width == 3
    missing = header.prefix_bytes(3) - header.prefix_bytes(2)
    assert upgraded.transfer.received_bytes == sent == missing
    assert upgraded.transfer.wasted_bytes == 0
    assert upgraded.transfer.requests == asked
    assert upgraded.transfer.retries == num_failures
    assert ArtifactReader(upgraded.artifact).verify()


def test_a_link_that_was_measured_in_vain_is_accounted_for(big):
    header = Header.parse(big)
    with hostile(big, pace_s=0.02) as server:  # about 3 MB/s
        fetch(server.url, bit_width=2, artifact_id=header.artifact_id)
        asked = len(server.requests)
        stays = fetch(server.url, deadline_s=0.1, artifact_id=header.artifact_id)
        assert len(server.requests) == asked + 1 == asked + stays.transfer.requests
    assert stays.bit_width == 2
    assert 0 < stays.transfer.received_bytes == stays.transfer.wasted_bytes <= 2 * 2**20


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- whom to believe -------------------------------------------------------------------------


def test_trust_on_first_use_warns_once(data):
    with hostile(data) as server:
        with pytest.warns(TrustWarning, match="is trusted on first use") as warned:
            fetch(server.url, bit_width=2)
        assert [warning.filename for warning in warned] == [__file__]  # whose line it is
        fetch(server.url, bit_width=3)  # a warning is an error here


def test_a_pinned_id_is_what_comes_or_nothing(data, tmp_path):
    with hostile(data) as server, pytest.raises(TrustError, match="was asked for"):
        fetch(server.url, artifact_id="0" * 64)


def test_row_13_a_consistent_forgery_is_refused_with_a_signature(data, tmp_path):
    private, public = keys(tmp_path)
    folder = tmp_path / "published"
    folder.mkdir()
    name = signed(folder, data, private)
    with plain_server(folder) as server:
        fetched = fetch(f"{server.url}/{name}", public_key=public)
        assert fetched.bit_width == 8
        forged = build(tmp_path / "forged", layers=layer_contents(seed=9))
        (folder / name).write_bytes(forged)
        with pytest.raises(TrustError, match="was asked for"):
            fetch(f"{server.url}/{name}", public_key=public, cache=tmp_path / "other")
        _, stranger = keys(tmp_path)
        with pytest.raises(TrustError, match=r"is no signature of http.*layers\.json"):
            fetch(f"{server.url}/{name}", public_key=stranger)


def test_a_signature_and_an_id_that_disagree_are_refused(data, tmp_path):
    private, public = keys(tmp_path)
    name = signed(tmp_path, data, private)
    with plain_server(tmp_path) as server, pytest.raises(TrustError, match="the signature is of"):
        fetch(f"{server.url}/{name}", public_key=public, artifact_id="0" * 64)


def test_a_sidecar_elsewhere_may_be_named_and_one_without_a_key_is_refused(data, tmp_path):
    private, public = keys(tmp_path)
    name = signed(tmp_path, data, private)
    with plain_server(tmp_path) as server:
        fetched = fetch(
            f"{server.url}/{name}", public_key=public, sidecar=tmp_path / f"{name}.layers.json"
        )
        assert fetched.header.artifact_id == id_of(data)
        with pytest.raises(LayeringError, match="nothing to verify it with"):
            fetch(f"{server.url}/{name}", sidecar="layers.json")


def test_the_sidecar_is_asked_for_with_user_and_query_of_the_artifact(tmp_path):
    _, public = keys(tmp_path)
    with hostile(b"", refuse=404) as server:
        address = server.url.replace("//", "//jo:s3cret@") + "?X-Signature=s3cret#part"
        with pytest.raises(SourceError, match="answered 404") as caught:
            fetch(address, public_key=public)
    assert "s3cret" not in str(caught.value)
    (request,) = server.requests
    assert request.path == f"/{NAME}.layers.json?X-Signature=s3cret"
    assert request.headers["authorization"].startswith("Basic ")


def test_another_query_is_another_address(data, big, tmp_path):
    with hostile(data, "swapped", other=big, after=1) as server, pytest.warns(TrustWarning):
        one, two, again = (
            fetch(f"{server.url}?id={number}", bit_width=2, cache=tmp_path / "cache")
            for number in (1, 2, 1)
        )
    assert (one.header.artifact_id, two.header.artifact_id) == (id_of(data), id_of(big))
    assert (again.header.artifact_id, again.transfer.requests) == (id_of(data), 0)


def test_what_was_refused_was_not_trusted_yet(data, tmp_path):
    with hostile(data) as server:
        with pytest.warns(TrustWarning), pytest.raises(BudgetError):
            fetch(server.url, max_bytes=10, cache=tmp_path / "cache")
        with pytest.warns(TrustWarning):
            fetch(server.url, cache=tmp_path / "cache")


def test_an_address_that_was_signed_has_nothing_unsigned_later(data, tmp_path):
    private, public = keys(tmp_path)
    name = signed(tmp_path, data, private)
    cache = tmp_path / "cache"
    with plain_server(tmp_path) as server:
        address = f"{server.url}/{name}"
        fetch(address, public_key=public, cache=cache)
        fetch(address, refresh=True, cache=cache)  # the same artifact is signed whoever asks
        newer = ModelInfo(**{**vars(MODEL), "revision": MODEL.revision + 1})
        newer_data = build(tmp_path / name, model=newer)
        for options in ({"refresh": True}, {"refresh": True, "allow_rollback": True}):
            with pytest.raises(TrustError, match="whose signature was verified, and has another"):
                fetch(address, cache=cache, **options)
        fetched = fetch(address, artifact_id=id_of(newer_data), cache=cache)
        assert fetched.header.artifact_id == id_of(newer_data)
        newest = ModelInfo(**{**vars(MODEL), "revision": MODEL.revision + 2})
        build(tmp_path / name, model=newest)
        with pytest.raises(TrustError, match="whose signature was verified"):  # a pin is for once
            fetch(address, refresh=True, cache=cache)


def test_an_address_that_is_signed_later_has_nothing_unsigned_from_then_on(data, tmp_path):
    private, public = keys(tmp_path)
    name = signed(tmp_path, data, private)
    with plain_server(tmp_path) as server:
        address = f"{server.url}/{name}"
        with pytest.warns(TrustWarning):
            fetch(address)
        fetch(address, public_key=public)  # of the artifact that is here already
        build(tmp_path / name, model=ModelInfo(**{**vars(MODEL), "revision": MODEL.revision + 1}))
        with pytest.raises(TrustError, match="whose signature was verified"):
            fetch(address, refresh=True)


def test_a_sidecar_that_is_too_large_is_not_read(data, tmp_path):
    private, public = keys(tmp_path)
    name = signed(tmp_path, data, private)
    (tmp_path / f"{name}.layers.json").write_bytes(b" " * (2**16 + 1))
    with plain_server(tmp_path) as server, pytest.raises(SourceError, match="has more than"):
        fetch(f"{server.url}/{name}", public_key=public)


def test_row_14_an_older_signed_revision_is_refused(data, tmp_path):
    private, public = keys(tmp_path)
    newer = build(
        tmp_path / "newer",
        model=ModelInfo(name=MODEL.name, revision=MODEL.revision + 1, created_by="tests"),
    )
    name = signed(tmp_path, newer, private)
    with plain_server(tmp_path) as server:
        url = f"{server.url}/{name}"
        fetch(url, public_key=public)
        signed(tmp_path, data, private)  # yesterday's, which was signed as well
        with pytest.raises(TrustError, match="but it had revision 4"):
            fetch(url, public_key=public, refresh=True)
        assert fetch(url, public_key=public, refresh=True, allow_rollback=True).bit_width == 8


# --- the rest --------------------------------------------------------------------------------


def test_the_header_alone_is_the_first_request_alone(data):
    with hostile(data) as server:
        found = fetch_header(server.url)
        assert len(server.requests) == found.transfer.requests == 1
    assert (found.name, found.total_bytes) == (server.url, len(data))
    assert found.header.artifact_id == id_of(data)


def test_evicting_frees_the_layers_above_or_all(data):
    header = Header.parse(data)
    with hostile(data) as server:
        fetch(server.url, artifact_id=header.artifact_id)
        freed = evict(server.url, keep_bit_width=2)
        assert freed == header.file_bytes - header.prefix_bytes(2)
        assert fetch(server.url, bit_width=2).transfer.received_bytes == 0
        assert evict(header.artifact_id) > 0
        assert evict(header.artifact_id) == 0
        with pytest.raises(SourceError, match="was never fetched"):
            evict("https://elsewhere.example/net")


def test_evicting_an_artifact_that_the_cache_does_not_know_is_an_error_that_says_what_is_there(
    data,
):
    header, unknown = Header.parse(data), "0" * 64
    with pytest.raises(SourceError, match=rf"artifact {unknown} .* holds nothing; give"):
        evict(unknown)
    with hostile(data) as server:
        fetch(server.url, artifact_id=header.artifact_id)
    with pytest.raises(SourceError, match=rf"holds tiny \({header.artifact_id[:12]}\); give"):
        evict(unknown, keep_bit_width=2)
    assert evict(header.artifact_id, keep_bit_width=2) > 0
    assert evict(header.artifact_id, keep_bit_width=2) == 0


def test_an_artifact_is_known_as_long_as_a_name_stands_for_it(data, tmp_path):
    path, artifact_id = tmp_path / "net", id_of(data)
    path.write_bytes(data)
    fetch(path)  # a path is not remembered, so that nothing is left of it in the end
    assert evict(artifact_id) > 0
    with pytest.raises(SourceError, match="holds nothing"):
        evict(artifact_id)
    with hostile(data) as server:
        fetch(server.url, artifact_id=artifact_id)
        assert evict(server.url) > 0
        assert evict(server.url) == evict(artifact_id) == 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [("https://a/b", True), ("hf://a/b/c", True), ("net.safetensors", False), ("C:/net", False)],
)
def test_an_address_is_told_from_a_path(address, expected):
    assert is_remote(address) is expected


def test_an_unknown_scheme_is_refused_with_those_that_are_known():
    with pytest.raises(SourceError, match=r"scheme 'ftp'; https, http, s3"):
        fetch("ftp://host/net")
