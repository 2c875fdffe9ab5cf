"""The commands of docs/delivery.md's section "Publish", run as they stand there.

What differs is where things are: ``/srv``, and the address of the server. The Hub is a fake, which
takes no Xet (uploads.py says more); where the ``aws`` command is not installed, ``bin/aws`` does by
boto3 what the page asks of it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from artifact.builders import build
from delivery.clients import ENVIRONMENT
from delivery.servers import hub, nginx, plain_server, s3

PAGE = (Path(__file__).parents[2] / "docs" / "delivery.md").read_text()
SECTION = PAGE.partition("\n## Publish\n")[2].partition("\n## ")[0]
NAME = "net.layered.safetensors"
ADDRESS = f"https://host/models/{NAME}"
AWS = f"""#!{sys.executable}
import sys, boto3
s3, cp, path, address = sys.argv[1:]
bucket, _, folder = address.removeprefix("s3://").partition("/")
assert (s3, cp, folder) == ("s3", "cp", "")
boto3.client("s3").upload_file(path, bucket, path)
"""


def blocks(language):
    """The page's blocks of a language, by the bold words that come before them."""
    parts = re.split(r"^\*\*([^*]+)\*\*", SECTION, flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        if match := re.search(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found[title] = match[1]
    return found


COMMANDS, LINES = blocks("bash"), blocks("nginx")


class Publisher:
    """Who has signed an artifact and is about to publish it, and where it is published."""

    def __init__(self, home):
        self.work, self.srv, self.home = home / "work", home / "srv", home
        for folder in (self.work, self.srv / "models", home / "bin"):
            folder.mkdir(parents=True)
        self.data = build(self.work / NAME, bit_widths=(2, 4, 8))
        self.run(COMMANDS["Sign it first"])

    def run(self, commands, url="", **env):
        """Run them by a shell that stops at the first that fails; what it printed."""
        commands = commands.replace("/srv", str(self.srv)).replace("https://host", url)
        path = [Path(sys.executable).parent, os.environ["PATH"], self.home / "bin"]
        here = {
            "HOME": self.home, "PLYWEIGHT_CACHE": self.home / "cache",
            "PATH": os.pathsep.join(map(str, path)), "HF_HOME": self.home / "hf",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.work,
            env=ENVIRONMENT | {name: str(value) for name, value in here.items()} | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def publish(self, title, address, *arguments, **env):
        """Run what the page says below ``title``; what it published is what was to be."""
        printed = self.run(COMMANDS[title], *arguments, **env)
        assert "4 bits, as asked" in printed
        self.run(f"plyweight fetch {address} --to got.safetensors", *arguments, **env)
        assert (self.work / "got.safetensors").read_bytes() == self.data


@pytest.fixture
def publisher(tmp_path):
    pytest.importorskip("model_signing")
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    return Publisher(tmp_path)


def test_every_block_of_commands_is_run_by_a_test():
    assert list(COMMANDS) == [
        "Sign it first",
        "A static server",
        "S3 and what speaks like it",
        "The Hugging Face Hub",
        "A server without byte ranges",
    ]
    assert len(COMMANDS) == SECTION.count("```bash\n")
    assert list(LINES) == ["A static server"]


@pytest.mark.parametrize("gzip", [False, True], ids=["as-is", "gzip"])
def test_a_static_server(publisher, gzip, tmp_path):
    lines = LINES["A static server"].replace("/srv", str(publisher.srv))
    (tmp_path / "elsewhere").mkdir()
    with nginx(tmp_path / "elsewhere", gzip=gzip, lines=lines) as server:
        publisher.publish("A static server", ADDRESS, server.url)


def test_s3(publisher):
    pytest.importorskip("boto3")
    shim = publisher.home / "bin" / "aws"  # the last on the path, so an `aws` goes before it
    shim.write_text(AWS)
    shim.chmod(0o755)
    with s3({}) as store:
        env = store.env | {"AWS_DEFAULT_REGION": store.env["AWS_REGION"]}
        publisher.publish("S3 and what speaks like it", f"s3://models/{NAME}", **env)


def test_the_hub(publisher):
    with hub({}, repo="owner/net", token="hf_t0ken") as server:
        env = server.env | {
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_TOKEN": "hf_t0ken",
            "HF_HUB_DISABLE_XET": "1",
        }
        publisher.publish("The Hugging Face Hub", f"hf://owner/net/{NAME}", **env)
        (commit,) = set(server.options.commits) - {server.commit}
        assert server.options.branches == {"main": commit, "v1.2": commit}
        published = set(server.options.commits[commit])
        assert published == {NAME, f"{NAME}.layers.json", f"{NAME}.layers.json.sig"}
        # The artifact went to the CDN by itself, the small files inside the commit.
        assert [request.method for request in server.cdn.requests].count("PUT") == 1


@pytest.mark.parametrize("serve", [plain_server, nginx], ids=["http.server", "nginx"])
def test_a_server_without_byte_ranges(publisher, serve):
    with serve(publisher.srv) as server:
        url = server.url.rstrip("/")
        title = "A server without byte ranges"
        publisher.publish(title, "https://host/models/net/layers.json", url)
