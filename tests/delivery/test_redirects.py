"""HTTP: a redirect leads nowhere it should not, and secrets go to nobody else."""

import logging
import re
import socket

import httpx2
import numpy as np
import pytest
from delivery.servers import NAME, certificate, environment, head_of, hostile, raw_server

from plyweight.artifact import ByteRange
from plyweight.delivery import hosts
from plyweight.delivery.http import MAX_REDIRECTS, HttpSource
from plyweight.delivery.source import open_remote
from plyweight.errors import SourceError, TransferError

DATA = np.random.default_rng(5).bytes(30_000)
RANGE = ByteRange(1000, 21_000)
PUBLIC = "93.184.216.34"
SLICE = DATA[RANGE.start : RANGE.stop]


@pytest.fixture
def open_source():
    """``HttpSource``, closed when the test ends."""
    opened = []

    def make(url, **options):
        opened.append(HttpSource(url, **options))
        return opened[-1]

    yield make
    for source in opened:
        source.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"))


def read(source, byte_range=RANGE, **options):
    """The range that came back, and its bytes."""
    with source.get(byte_range, **options) as reply:
        return reply.byte_range, b"".join(reply.body)


# --- redirects ----------------------------------------------------------------------------------


def test_a_redirect_is_followed_and_its_end_remembered(open_source):
    with hostile(DATA, "redirect") as server:
        source = open_source(server.url)
        assert read(source) == (RANGE, SLICE)
        assert read(source) == (RANGE, SLICE)
        paths = [request.path for request in server.requests]
        assert paths == [f"/{NAME}", f"/elsewhere/{NAME}", f"/elsewhere/{NAME}"]


def test_a_redirect_loop_ends(open_source):
    with hostile(DATA, "redirect-loop") as server:
        with pytest.raises(SourceError, match="more than 5 times"):
            read(open_source(server.url))
        assert len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("location", ["", "ftp://127.0.0.1/x", "http://[", "mailto:x"])
def test_a_redirect_to_something_else_than_the_web_is_refused(open_source, location):
    head = head_of(302, f"Location: {location}", "Content-Length: 0")
    with raw_server(head) as url, pytest.raises(SourceError, match="not a URL"):
        read(open_source(url))


def test_a_redirect_from_https_to_http_is_refused_whatever_is_allowed(tls, open_source):
    with hostile(DATA) as plain, environment({"SSL_CERT_FILE": tls.path}):
        with hostile(DATA, "redirect", tls=tls, to=plain.url) as server:
            source = open_source(server.url, allow_http=True)
            with pytest.raises(SourceError, match="redirected to plain http"):
                read(source)
        assert plain.requests == []


def test_a_redirect_to_http_on_another_machine_needs_the_permission(open_source):
    with hostile(DATA, "redirect", to="http://192.0.2.1/x") as server:
        source = open_source(server.url)
        with pytest.raises(SourceError, match=r"redirected to plain http at 192\.0\.2\.1"):
            read(source)


def test_the_token_goes_to_the_original_host_and_to_no_other(open_source):
    with hostile(DATA) as other:
        to = f"{other.url}?X-Amz-Signature=secret"
        with hostile(DATA, "redirect", token="t0ken", to=to) as server:
            source = open_source(server.url, token="t0ken")
            assert read(source) == (RANGE, SLICE)
            assert read(source) == (RANGE, SLICE)
            assert server.requests[0].headers["authorization"] == "Bearer t0ken"
        assert len(other.requests) == 2
        assert all("authorization" not in request.headers for request in other.requests)


def test_user_and_password_of_the_url_go_to_the_original_host_and_to_no_other(open_source):
    with hostile(DATA) as other, hostile(DATA, "redirect", to=other.url) as server:
        source = open_source(server.url.replace("://", "://jo%40e:pä%20ss@"))
        assert read(source) == (RANGE, SLICE)
        assert server.requests[0].headers["authorization"] == "Basic am9AZTpww6Qgc3M="
        assert "authorization" not in other.requests[0].headers


def test_the_token_is_sent_again_where_a_redirect_stays_on_its_host(open_source):
    with hostile(DATA, "redirect", token="t0ken") as server:
        read(open_source(server.url, token="t0ken"))
        assert server.requests[1].headers["authorization"] == "Bearer t0ken"


def test_an_expired_signed_url_is_asked_for_again_once(open_source):
    with hostile(DATA, "signed", after=2) as server:
        source = open_source(server.url)
        for _ in range(3):
            assert read(source) == (RANGE, SLICE)
        statuses = [request.status for request in server.requests]
        assert statuses == [302, 206, 206, 403, 302, 206]


def test_a_signed_url_that_is_refused_even_when_it_is_new_is_a_source_error(open_source):
    with hostile(DATA, "signed", after=0) as server:
        with pytest.raises(SourceError, match="may not be read"):
            read(open_source(server.url))
        assert [request.status for request in server.requests] == [302, 403, 302, 403]


def test_a_host_that_a_redirect_led_to_is_forgotten_when_it_is_gone(open_source):
    with (
        hostile(DATA) as first,
        hostile(DATA) as second,
        hostile(DATA, "redirect", to=first.url) as server,
    ):
        source = open_source(server.url)
        assert read(source) == (RANGE, SLICE)
        first.kill()
        server.options.to = second.url
        with pytest.raises(TransferError, match="redirected to http://127"):
            read(source)
        assert read(source) == (RANGE, SLICE)


# --- redirects inwards --------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """What a name stands for: one address after another; the last one stays."""
    table = {}
    real = socket.getaddrinfo

    def lookup(host, port, *arguments, **options):
        if host not in table:
            return real(host, port, *arguments, **options)
        address = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return real(address, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return table


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://192.168.0.1/",
        "http://10.0.0.1/",
        "http://[fe80::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://[64:ff9b::a00:1]/",
        "http://100.100.100.200/",
        "http://inside.example/",
    ],
)
def test_a_redirect_inwards_is_refused_before_anything_is_sent(open_source, answers, target):
    answers["inside.example"] = ["10.1.2.3"]
    with hostile(DATA, "redirect", to=target) as server:
        source = open_source(server.url, allow_http=True)
        with pytest.raises(SourceError, match="may be an attack on this network"):
            read(source)
        assert len(server.requests) == 1


def test_the_metadata_service_is_not_asked_even_by_a_server_of_this_machine(open_source):
    with hostile(DATA, "redirect-to-metadata") as server:
        source = open_source(server.url, allow_http=True)
        with pytest.raises(SourceError, match="a metadata address"):
            read(source)


def test_a_public_host_cannot_redirect_to_this_machine(open_source, answers):
    with hostile(DATA) as inner, hostile(DATA, "redirect", to=inner.url) as server:
        answers["public.example"] = ["127.0.0.1", PUBLIC]  # so that we get there at all
        source = open_source(f"http://public.example:{server.port}/{NAME}", allow_http=True)
        with pytest.raises(SourceError, match="a loopback address"):
            read(source)
        assert len(server.requests) == 1
        assert inner.requests == []


def test_a_name_that_stands_for_this_machine_a_moment_later_is_caught(open_source, answers):
    with hostile(DATA) as inner:
        to = f"http://rebound.example:{inner.port}/{NAME}"
        with hostile(DATA, "redirect", to=to) as server:
            answers["public.example"] = ["127.0.0.1", PUBLIC]
            answers["rebound.example"] = [PUBLIC, "127.0.0.1"]  # when judged, when connected
            source = open_source(f"http://public.example:{server.port}/{NAME}", allow_http=True)
            with pytest.raises(SourceError, match=r"to rebound\.example, a loopback address"):
                read(source)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("93.184.216.34", "global"),
        ("2606:2800:220:1:248:1893:25c8:1946", "global"),
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("::", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("2002:7f00:1::", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd12::1", "private"),
        ("224.0.0.1", "private"),
        ("255.255.255.255", "private"),
        ("169.254.0.1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("169.254.169.254", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("168.63.129.16", "metadata"),
    ],
)
def test_the_kind_of_an_address(address, kind):
    assert hosts.kind_of(address) == kind


def test_other_spellings_of_an_address_are_what_the_system_makes_of_them():
    for spelling in ("127.1", "2130706433", "0x7f000001"):
        assert hosts.kinds_of(spelling, 80) == {"loopback"}


def test_a_name_that_nobody_knows_is_a_transfer_error(monkeypatch):
    def lookup(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(hosts.socket, "getaddrinfo", lookup)
    with pytest.raises(TransferError, match="check the name and the network"):
        hosts.kinds_of("nobody.example", 443)


def test_behind_a_proxy_only_numbers_are_judged(open_source):
    with hostile(DATA) as proxy, environment({"http_proxy": proxy.base, "no_proxy": "127.0.0.1"}):
        assert hosts.is_proxied("http", "models.example")
        assert not hosts.is_proxied("http", "127.0.0.1")
        source = open_source(f"http://models.example/{NAME}", allow_http=True)
        assert read(source) == (RANGE, SLICE)
        assert proxy.requests[0].path == f"http://models.example/{NAME}"
        proxy.options.mode, proxy.options.to = "redirect", "http://10.0.0.1/"
        with pytest.raises(SourceError, match="a private address"):
            read(source)


# --- addresses and secrets ----------------------------------------------------------------------


def test_plain_http_to_another_machine_needs_the_permission(open_source):
    with pytest.raises(SourceError, match="--allow-http") as caught:
        HttpSource("http://models.example/net?key=secret")
    assert "secret" not in str(caught.value)
    open_source("http://models.example/net", allow_http=True)
    open_source("http://localhost/net")
    open_source("http://[::1]/net")
    with pytest.raises(SourceError):
        HttpSource("http://localhost.example/net")


@pytest.mark.parametrize(
    "url", ["https://", "https:///path", "http:net", "https://u:secret@[/x", "https://h:secret/x"]
)
def test_an_address_that_is_no_url_is_refused_without_repeating_it(url):
    with pytest.raises(SourceError, match="not a URL") as caught:
        HttpSource(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_scheme_that_nobody_knows_is_refused_without_repeating_the_address():
    with pytest.raises(SourceError, match="has the scheme 'ftp'; https, http, s3") as caught:
        open_remote("ftp://jo:secret@models.example/net")
    assert "secret" not in str(caught.value)


def test_a_token_beside_a_user_and_a_token_that_is_no_header_are_refused():
    with pytest.raises(SourceError, match="give one of them"):
        HttpSource("https://jo:secret@models.example/net", token="t0ken")
    for token in ("t0ken\r\nHost: x", "", "t ken", "tökén"):
        with pytest.raises(SourceError, match="no header may") as caught:
            HttpSource("https://models.example/net", token=token)
        assert not token or token not in str(caught.value)


def test_secrets_are_in_no_name_and_in_no_message(open_source):
    secrets = ("s3cret", "jo", "t0ken", "X-Amz")
    url = f"http://jo:s3cret@127.0.0.1:1/a/{NAME}?X-Amz-Signature=s3cret#s3cret"
    source = open_source(url)
    assert re.fullmatch(rf"http://127\.0\.0\.1:1/a/{NAME}\?\[sha256 [0-9a-f]{{16}}\]", source.name)
    with pytest.raises(TransferError) as caught:
        read(source)
    messages = [str(caught.value)]
    for mode in ("busy", "shifted", "cut", "gzip-bomb", "redirect-loop", "redirect-to-metadata"):
        with hostile(DATA, mode) as server:
            query = "?X-Amz-Signature=s3cret"
            source = open_source(server.url + query, token="t0ken")
            with pytest.raises((TransferError, SourceError)) as caught:
                read(source)
            messages.append(str(caught.value))
    with hostile(DATA, "signed", after=0) as server:
        with pytest.raises(SourceError) as caught:
            read(open_source(server.url))
        messages.append(str(caught.value))
    for message in messages:
        assert not any(secret in message for secret in secrets), message


def test_secrets_are_in_no_line_that_is_logged(open_source, caplog):
    caplog.set_level(logging.DEBUG)
    with hostile(DATA, "signed", after=9) as server:
        read(open_source(f"{server.url}?X-Amz-Signature=secret0", token="secret"))
    to = "/hidden?X-Amz-Signature=secret"
    with hostile(DATA) as cdn, hostile(DATA, "redirect", to=cdn.base + to) as server:
        read(open_source(server.url))
    lines = [record.getMessage() for record in caplog.records]
    assert not any("secret" in line for line in lines)
    told = [line for line in lines if line.startswith("HTTP Request: GET http://127.0.0.1:")]
    ends = [re.sub(r"^.*:[0-9]+", "", line.partition(' "')[0]) for line in told]
    assert ends == [f"/{NAME}", "/signed", f"/{NAME}", "/..."]


def test_what_others_ask_by_httpx2_is_logged_as_it_is(open_source, caplog):
    caplog.set_level(logging.INFO)
    with hostile(DATA) as server:
        read(open_source(server.url))
        with httpx2.Client() as client:
            client.get(f"{server.url}?page=7")
    assert [("page=7" in record.getMessage()) for record in caplog.records] == [False, True]
