"""What ``hf upload`` and ``hf repos tag create`` ask of a Hub: the half of the fake that writes.

    POST /api/repos/create                       the repository is there: 409, which they expect
    POST /api/models/REPO/preupload/REVISION     which files go by LFS, which inside the commit
    POST /REPO.git/info/lfs/objects/batch        where to PUT the former: at the CDN
    PUT  CDN/SHA256                              one of them
    POST /api/models/REPO/commit/REVISION        a line of JSON for each file
    POST /api/models/REPO/tag/REVISION

The Hub's third way, Xet, has a protocol of its own that is not imitated, so its clients need
``HF_HUB_DISABLE_XET=1``; what is committed, and every download, is the same.
"""

import base64
import hashlib
import json
import re
from urllib.parse import unquote, urlsplit

from delivery.local import Handler

__all__ = ["Uploads"]


class Uploads(Handler):
    """Answers POST for the Hub's handler, whose ``commit`` finds revisions; PUT for the CDN's."""

    def do_POST(self):  # noqa: N802 (http.server asks for these names)
        self.answer()

    do_PUT = do_POST  # noqa: N815

    def write(self):
        """Answer a POST whose token was right."""
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/repos/create":
            return self.json(409, url=f"{self.owner.base}/{self.owner.options.repo}")
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.commit(match[1], "main") and self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/(.+)", path):
            repo, verb, revision = match.groups()
            if commit := self.commit(repo, revision):
                getattr(self, f"post_{verb}")(body, revision, commit)
            return None
        return self.json(404)

    def json(self, status, **content):
        self.reply(status, json.dumps(content).encode(), Content_Type="application/json")

    def post_preupload(self, body, revision, commit):
        # As the .gitattributes of a new repository have it.
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.json(200, files=modes)

    def batch(self, asked):
        cdn = self.owner.options.cdn
        objects = [
            wanted
            if wanted["oid"] in cdn.options.blobs  # no action: it need not be sent again
            else wanted | {"actions": {"upload": {"href": f"{cdn.base}/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self.json(200, transfer="basic", objects=objects)

    def post_commit(self, body, revision, commit):
        options = self.owner.options
        files = dict(options.commits[commit])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = options.cdn.options.blobs[value["oid"]]
        made = self.owner.push(files, revision)
        self.json(200, commitOid=made, commitUrl=f"{self.owner.base}/{options.repo}/commit/{made}")

    def post_tag(self, body, revision, commit):
        self.owner.options.branches[json.loads(body)["tag"]] = commit
        self.json(200)

    def body(self):
        """Of a POST or PUT, whose length is given."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    def keep(self, digest, blobs):
        """Answer the PUT of a blob, whose name is its digest."""
        body = self.body()
        if hashlib.sha256(body).hexdigest() != digest:
            return self.reply(400)
        blobs[digest] = body
        return self.reply(200)
