"""A server with one object that lies in every way that servers and networks lie."""

import contextlib
import functools
import gzip
import itertools
import math

from delivery.local import PIECE, Handler, LocalServer

NAME = "model.layered.safetensors"
HEAD_BYTES = 1000  # of a head that comes slowly: at least ten seconds
ENDLESS = 10 * 2**30  # what an endless body would send if nobody hung up


class _Hostile(Handler):
    def answer(self):
        options = self.begin()
        if options.before:
            options.before(self.entry)
        self.data, self.etag = options.data, options.etag
        if options.refuse:
            return self.reply(options.refuse)
        given = self.headers.get("Authorization")
        if options.token and self.path == f"/{NAME}" and given != f"Bearer {options.token}":
            return self.reply(401)
        with self.owner.lock:
            self.number = next(options.numbers)
        faulty = options.when(self.number) if options.when else self.number < options.times
        return getattr(self, MODES[options.mode])() if faulty else self.right()

    def right(self):
        self.honest(self.data, self.etag)

    def cut_out(self, shift=0, data=None):
        """The bytes asked for, and the headers that go with them, ``shift`` bytes off."""
        start, stop = self.asked(len(self.data)) or (0, len(self.data))
        where = f"bytes {start + shift}-{stop + shift - 1}/{len(self.data)}"
        body = (data or self.data)[start + shift : stop + shift]
        return body, {"ETag": self.etag, "Content_Range": where}

    def gzip_if_offered(self):
        if "gzip" not in self.headers.get("Accept-Encoding", ""):
            return self.right()
        packed = gzip.compress(self.data, 1)
        return self.reply(200, packed, Content_Encoding="gzip", ETag=self.etag)

    def busy(self):
        self.reply(503, b"busy", Retry_After=self.owner.options.retry_after)

    def rate_limited(self):
        self.reply(429, b"slower", Retry_After=self.owner.options.retry_after)

    def shifted(self):
        body, headers = self.cut_out(shift=1)
        self.reply(206, body, **headers)

    def short(self):
        asked = self.asked(len(self.data))
        if asked is None:
            return self.right()
        start, stop = asked
        stop = start + max(1, (stop - start) // 2)
        where = f"bytes {start}-{stop - 1}/{len(self.data)}"
        return self.reply(206, self.data[start:stop], ETag=self.etag, Content_Range=where)

    def cut(self):
        body, headers = self.cut_out()
        self.close_connection = True
        self.reply(206, body[: len(body) // 2], length=len(body), **headers)

    def flip(self):
        body, headers = self.cut_out()
        body = bytearray(body)
        body[len(body) // 3] ^= 0x10
        self.reply(206, body, **headers)

    def whole(self):
        self.reply(200, self.data, ETag=self.etag)

    def sometimes_whole(self):
        if self.number % 2:
            return self.whole()
        return self.right()

    def no_length(self):
        self.reply(200, self.data, length=False, ETag=self.etag)

    def swapped(self, *, if_match=True, same_etag=False):
        if self.number < self.owner.options.after:
            return self.right()
        etag = self.etag if same_etag else '"swapped"'
        return self.honest(self.owner.options.other, etag, if_match=if_match)

    def swapped_silently(self):
        self.swapped(if_match=False)

    def swapped_same_etag(self):
        self.swapped(same_etag=True)

    def lying_total(self):
        body, headers = self.cut_out()
        headers["Content_Range"] = headers["Content_Range"].split("/")[0] + f"/{2**50}"
        self.reply(206, body, **headers)

    def endless(self, length=False):
        body, headers = self.cut_out()
        self.close_connection = True
        self.reply(206, body, length=length, **headers)
        while self.entry.sent < ENDLESS:
            self.send(bytes(PIECE))

    def endless_length(self):
        self.endless(ENDLESS)

    def gzip_bomb(self):
        _, headers = self.cut_out()
        self.reply(206, _bomb(), Content_Encoding="gzip", **headers)

    def redirect(self):
        if self.path.startswith("/elsewhere"):
            return self.right()
        return self.reply(302, Location=self.owner.options.to or f"/elsewhere/{NAME}")

    def redirect_loop(self):
        self.reply(302, Location=f"/again/{self.number}")

    def redirect_to_metadata(self):
        self.reply(302, Location="http://169.254.169.254/latest/meta-data/iam/")

    def signed(self):
        uses = self.owner.options.uses
        path, _, signature = self.path.partition("?X-Amz-Signature=")
        if path != "/signed":
            uses.append(0)
            return self.reply(302, Location=f"/signed?X-Amz-Signature=secret{len(uses)}")
        with self.owner.lock:
            key = int(signature.removeprefix("secret")) - 1
            uses[key] += 1
            expired = uses[key] > self.owner.options.after
        return self.reply(403, b"<Code>AccessDenied</Code>") if expired else self.right()

    def drip(self):
        body, headers = self.cut_out()
        self.reply(206, length=len(body), **headers)
        for byte in body:
            self.pause(0.01)
            self.send(bytes([byte]))

    def drip_head(self):
        body, headers = self.cut_out()
        self.close_connection = True
        self.send_response(206)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("X-Slow", "x" * HEAD_BYTES)
        head, self._headers_buffer = b"".join(self._headers_buffer), []
        for byte in head:
            self.pause(0.01)
            self.wfile.write(bytes([byte]))
        self.wfile.write(b"\r\n")
        self.send(body)

    def stall(self):
        self.pause(3600)

    def stall_body(self):
        body, headers = self.cut_out()
        self.reply(206, body[: len(body) // 2], length=len(body), **headers)
        self.pause(3600)


MODES = {
    "ok": "right",
    "gzip-if-offered": "gzip_if_offered",  # 200 in gzip, unless identity is asked for
    "busy": "busy",  # 503
    "rate-limited": "rate_limited",  # 429
    "shifted": "shifted",  # 206 of a range one byte later, and says so
    "short": "short",  # 206 of half the range, and says so: allowed
    "cut": "cut",  # closes in the middle of the body
    "flip": "flip",  # one bit of the body is wrong
    "whole": "whole",  # 200 with everything instead of 206
    "sometimes-whole": "sometimes_whole",  # ... at every second reply
    "no-length": "no_length",  # 200 with everything and no Content-Length
    "swapped": "swapped",  # other bytes after `after` replies; 412 for the old ETag
    "swapped-silently": "swapped_silently",  # ... but If-Match is ignored
    "swapped-same-etag": "swapped_same_etag",  # ... and the ETag stays: only digests can tell
    "lying-total": "lying_total",  # Content-Range says the object has 2**50 bytes
    "endless": "endless",  # 10 GB follow the bytes asked for, until the connection closes
    "endless-length": "endless_length",  # ... and Content-Length says so
    "gzip-bomb": "gzip_bomb",  # 206 in gzip whether asked for or not, 1 GB when unpacked
    "redirect": "redirect",  # 302 to `to`, or to another path
    "redirect-loop": "redirect_loop",  # 302 for ever
    "redirect-to-metadata": "redirect_to_metadata",  # 302 to 169.254.169.254
    "signed": "signed",  # 302 to a URL that is good for `after` replies, then 403
    "drip": "drip",  # a byte every 10 ms
    "drip-head": "drip_head",  # ... already of the head
    "stall": "stall",  # no reply at all, and the connection stays open
    "stall-body": "stall_body",  # half the body, then nothing
}


@contextlib.contextmanager
def hostile(data, mode="ok", *, tls=None, **options):
    """A server with one object that misbehaves as its mode and options say."""
    known = {
        "mode": mode, "data": bytes(data), "other": None, "after": 2, "times": math.inf,
        "when": None, "to": None, "retry_after": "1", "etag": '"v1"', "token": None, "pace_s": 0,
        "before": None, "refuse": None, "numbers": itertools.count(), "uses": [],
    }  # fmt: skip
    assert mode in MODES, mode
    assert options.keys() <= known.keys(), options.keys() - known.keys()
    server = LocalServer(_Hostile, path=f"/{NAME}", tls=tls, **known | options)
    try:
        yield server
    finally:
        server.kill()


@functools.cache
def _bomb():
    """A gigabyte of zeros, packed."""
    return b"".join(itertools.repeat(gzip.compress(bytes(2**24), 9), 64))


def odd(number):
    """For ``when``: every second reply, the second first."""
    return number % 2 == 1
