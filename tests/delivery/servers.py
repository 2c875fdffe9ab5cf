"""Real servers to fetch from, honest and hostile, each a `with` block on a port of 127.0.0.1.

    with hostile(data, "cut", times=2) as server:     lies as its mode says; MODES names them all
        fetch(server.url)                             http://127.0.0.1:4012/model.layered.safetensors
        server.requests[0].range, .sent, .status, .headers["if-match"]
        server.kill(); server.restart()               as SIGKILL does it; the same port again

    with nginx(folder, gzip=True, rate="2m") as server:    f"{server.url}/{name}"; kill, restart
    with plain_server(folder) as server:                   Python's http.server: no Range, no ETag
    with s3({"a/b.safetensors": data}) as store:           f"{store.url}/a/b.safetensors"; store.put
    with hub({"a.safetensors": data}) as hub:              hub.address("a.safetensors"); hub.push
                                                           and `hf upload`, as uploads.py says
    with raw_server(head_of(206, "X: y") + body) as url:   these bytes, whatever is asked

``s3`` and ``hub`` set the environment that clients read, and put it back; ``store.env`` and
``hub.env`` are what they set, for a subprocess (which inherits ``os.environ`` anyway).

Options of ``hostile(data, mode="ok", ...)``; a "reply" is one answer to a GET:

    times=2           the first two replies are faulty, the others right (default: every reply)
    when=odd          or: the replies whose number, from 0, ``when`` says yes to
    other=data2       what a swapped object changes to
    after=3           the swap comes after 3 replies; a signed URL is good for 3
    to=url            where "redirect" leads (default: to another path of the same server)
    retry_after="1"   what 429 and 503 ask for (None: no such header)
    etag='"v1"'       None sends none; 'W/"v1"' a weak one
    token="secret"    a GET of server.url without this bearer token gets 401
    refuse=403        every GET gets this status instead of an answer
    pace_s=0.01       a pause before each 64 KiB, to be slow enough to be killed in the middle
    before=function   called with the Request before it is answered, in the server's thread
    tls=certificate   speak https with a `certificate(folder)`, which a client trusts whose
                      environment has SSL_CERT_FILE=certificate.path: environment({...}) sets it
"""

import contextlib
import functools
import hashlib
import http.client
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from delivery.hostile import MODES, NAME, hostile, odd
from delivery.local import (
    Certificate,
    LocalServer,
    Request,
    certificate,
    environment,
    free_port,
    head_of,
    raw_server,
    temporary_folder,
    wait_for_port,
)
from delivery.uploads import Uploads

__all__ = [
    "MODES",
    "NAME",
    "Certificate",
    "LocalServer",
    "Nginx",
    "Request",
    "certificate",
    "environment",
    "free_port",
    "head_of",
    "hostile",
    "hub",
    "nginx",
    "odd",
    "plain_server",
    "raw_server",
    "s3",
]


@contextlib.contextmanager
def plain_server(folder):
    """Python's own ``http.server``: the whole file whatever the range, no ETag."""

    class Plain(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=os.fspath(folder))

        def log_message(self, *arguments):
            """Quiet."""

    server = LocalServer(Plain)
    try:
        yield server
    finally:
        server.kill()


class Nginx:
    """An nginx of its own over a folder."""

    def __init__(self, folder, home, *, gzip=False, rate=None, lines=""):
        program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
        if program is None:
            pytest.skip("nginx is not installed")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        temporary = "\n".join(
            f"{kind}_temp_path {home}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        packing = "gzip on; gzip_types *; gzip_min_length 0;" if gzip else "gzip off;"
        (Path(home) / "nginx.conf").write_text(f"""
            daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
            events {{ worker_connections 256; }}
            http {{
                access_log off; sendfile on; {temporary}
                default_type application/octet-stream;
                {packing} {f"limit_rate {rate}; sendfile_max_chunk 8k;" if rate else ""}
                server {{ listen 127.0.0.1:{self.port}; root "{folder}"; {lines} }}
            }}""")
        self._command = [program, "-p", os.fspath(home), "-c", f"{home}/nginx.conf"]
        self._process = None
        self.restart()

    def restart(self):
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port, self._process)

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def nginx(folder, **options):
    """Nginx over a folder; ``gzip=True`` packs whatever it may, ``rate="1m"`` is bytes a second.

    ``lines`` are more of its configuration, inside of ``server { }``.
    """
    with temporary_folder() as home:
        server = Nginx(folder, home, **options)
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def s3(files, *, bucket="models"):
    """Moto's S3 server with these objects; its address and keys are in the environment."""
    threaded = pytest.importorskip("moto.server").ThreadedMotoServer
    obstore = pytest.importorskip("obstore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line per request
    server = threaded(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    try:
        with environment(env):
            _http(port, "PUT", f"/{bucket}")
            store = obstore.store.S3Store(bucket)
            put = functools.partial(obstore.put, store)
            for key, data in files.items():
                put(key, bytes(data))
            yield SimpleNamespace(url=f"s3://{bucket}", env=env, put=put, port=port)
    finally:
        _http(port, "POST", "/moto-api/reset")
        server.stop()


# --- the Hub's two endpoints ----------------------------------------------------------------


class _Hub(Uploads):
    def answer(self):
        options = self.begin()
        token = options.token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            return self.reply(401, b"{}", X_Error_Code="GatedRepo")
        if self.command == "POST":
            return self.write()
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.revision(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        return self.reply(404, b"{}")

    def revision(self, repo, revision):
        commit = self.commit(repo, revision or "main")
        if commit:
            body = json.dumps({"id": repo, "sha": commit, "siblings": []}).encode()
            self.reply(200, body, Content_Type="application/json")

    def resolve(self, repo, revision, path):
        commit = self.commit(repo, revision)
        data = commit and self.owner.options.commits[commit].get(path)
        if data is not None:
            digest = hashlib.sha256(data).hexdigest()
            to = f"{self.owner.options.cdn.base}/{digest}?Signature=secret&Key-Pair-Id=K1"
            self.reply(302, Location=to, X_Repo_Commit=commit, X_Linked_ETag=f'"{digest}"')
        elif commit:
            self.reply(404, b"{}", X_Error_Code="EntryNotFound")

    def commit(self, repo, revision):
        """The hash of a revision; None, and a reply, if there is no such thing."""
        options = self.owner.options
        if repo != options.repo:
            return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        commit = options.branches.get(revision, revision)
        if commit not in options.commits:
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
        return commit


class _Cdn(Uploads):
    def answer(self):
        blobs = self.begin().blobs
        digest = urlsplit(self.path).path.strip("/")
        if self.command == "PUT":
            return self.keep(digest, blobs)
        if "Authorization" in self.headers or digest not in blobs:
            return self.reply(400)  # as S3 does when there are two kinds of credentials
        return self.honest(blobs[digest], f'"{digest}"')


@contextlib.contextmanager
def hub(files, *, repo="owner/model", token=None):
    """A Hub with one model repository, and its CDN on another port; HF_ENDPOINT points at it."""
    pytest.importorskip("huggingface_hub.constants")  # which importing the library leaves for later
    library = pytest.importorskip("huggingface_hub")
    cdn = LocalServer(_Cdn, blobs={})
    commits, branches = {}, {}
    options = {"repo": repo, "token": token, "cdn": cdn, "commits": commits, "branches": branches}
    server = LocalServer(_Hub, **options)

    def push(files, branch="main"):
        """A new commit, and its hash."""
        commit = hashlib.sha1(f"{branch} {len(commits)}".encode()).hexdigest()
        cdn.options.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        commits[commit], branches[branch] = files, commit
        return commit

    def address(path, revision=None):
        return f"hf://{repo}{f'@{revision}' if revision else ''}/{path}"

    server.commit, server.push, server.address, server.cdn = push(files), push, address, cdn
    # No token of whoever runs the tests is ever sent, and nothing is asked of the real Hub.
    server.env = {
        "HF_ENDPOINT": server.base, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    with environment(server.env), pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setattr(library.constants, name, True)  # it read them when it was imported
        try:
            yield server
        finally:
            library.close_session()
            server.kill()
            cdn.kill()


def _http(port, method, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path)
        connection.getresponse().read()
    finally:
        connection.close()
