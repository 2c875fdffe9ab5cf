"""The commands of docs/delivery.md's section "Publish", run as they stand there.

What differs is where things are: the folder that is served, the address of the server, and, for
the Hub, a fake of it (uploads.py) that takes no Xet. ``aws s3 cp`` is an upload by boto3, which is
what it calls.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from artifact.builders import big_content
from delivery.servers import hub, nginx, plain_server, s3

from plyweight.artifact import Header, write_artifact

PAGE = (Path(__file__).parents[2] / "docs" / "delivery.md").read_text()
NAME = "net.layered.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Where the publisher stands: the artifact, and a home for keys and cache."""
    write_artifact(tmp_path / NAME, **big_content(bit_widths=(2, 4)))
    (tmp_path / "srv").mkdir()
    return tmp_path


def block(word):
    """The lines of the page's block of commands in which ``word`` stands."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if word in text]
    return found


def run(commands, folder, **env):
    """Run commands by a shell that stops at the first that fails."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env=os.environ
        | {
            "HOME": str(folder / "home"),
            "PLYWEIGHT_CACHE": str(folder / "cache"),
            "PATH": f"{scripts}:{os.environ['PATH']}",
        }
        | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_is_held(folder):
    """The cache has the artifact at 4 bits, verified when it arrived."""
    artifact_id = Header.parse((folder / NAME).read_bytes()).artifact_id
    (note,) = (folder / "cache" / "artifacts").iterdir()
    assert note.name == artifact_id
    assert "2, 4" in run("plyweight cached", folder)


def test_on_a_static_server_signed(folder):
    (folder / "home").mkdir()
    run(block("openssl ecparam"), folder)
    assert not list(folder.glob("key.pem"))
    with nginx(folder / "srv", gzip=True) as server:
        commands = block("cp net.layered.safetensors* /srv/models/")
        (folder / "srv" / "models").mkdir()
        commands = commands.replace("/srv/", f"{folder}/srv/")
        run(commands.replace("https://host", f"http://127.0.0.1:{server.port}"), folder)
    check_is_held(folder)


def test_on_s3(folder):
    commands = block("aws s3 cp").splitlines()
    assert commands[0] == f"aws s3 cp {NAME} s3://models/{NAME}"
    boto3 = pytest.importorskip("boto3")
    with s3({}) as store:
        client = boto3.client("s3", endpoint_url=store.env["AWS_ENDPOINT_URL"])
        client.upload_file(str(folder / NAME), "models", NAME)
        run("\n".join(commands[1:]), folder, **store.env)
    check_is_held(folder)


def test_on_the_hub(folder):
    with hub({}, repo="owner/net") as fake:
        env = fake.env | {"HF_HUB_DISABLE_XET": "1"}
        upload, newest, tagged = block("hf upload").splitlines()
        run(f"{upload}\n{newest}", folder, **env)
        check_is_held(folder)
        run(f"hf repos tag create owner/net v1.2\n{tagged}", folder, **env)
    check_is_held(folder)


def test_in_parts_on_a_server_without_ranges(folder):
    commands = block("plyweight split").replace("/srv/", f"{folder}/srv/")
    (folder / "srv" / "models").mkdir()
    with plain_server(folder / "srv") as server:
        run(commands.replace("https://host", server.url), folder)
    check_is_held(folder)
