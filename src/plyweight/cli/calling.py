"""Calling: what the commands have in common, and how what a person types becomes values.

3MB  1.5MiB  300k  4096      sizes: powers of 1000, with an i of 1024; down to a whole byte
5  0.5                       seconds
sha256:5124...  5124...      the 64 digits of an artifact's id
"""

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from plyweight.errors import TrustWarning

__all__ = [
    "AllowHttp",
    "Artifact",
    "ArtifactId",
    "AsJson",
    "Authorities",
    "CacheFolder",
    "InterruptionError",
    "Patience",
    "PublicKey",
    "needed_for",
    "note",
    "parse_id",
    "parse_seconds",
    "parse_size",
    "print_json",
    "refuse_together",
    "spoken_warnings",
    "token",
]

TOKEN = "PLYWEIGHT_TOKEN"  # in the environment: an option would show in the list of processes

UNITS = {"": 1, "B": 1} | {
    f"{letter}{unit}": base ** (power + 1)
    for base, units in ((1000, ("", "B")), (1024, ("iB",)))
    for power, letter in enumerate("kMGT")
    for unit in units
}
UNITS |= {unit.replace("k", "K"): factor for unit, factor in UNITS.items() if "k" in unit}
MAX_SIZE = 2**63 - 1

# Arguments that the library's sentences name, as the options that they are here.
OPTIONS = (
    (r"`allow_http` \(--allow-http\)", "--allow-http"),
    (r"`allow_rollback`", "--allow-rollback"),
    (r"`max_waste_bytes=(\d+)`", r"--max-waste \1"),
    (r"\bartifact_id=", "--id"),
    (r"\bpublic_key=", "--public-key"),
    (r"`plyweight\.fetch`", "`plyweight fetch`"),
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Artifact = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="An artifact, whole or a prefix; or the folder of a split one."
    ),
]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Allow plain http to other machines.")
]
PublicKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Key (PEM) that must have signed it."),
]
Authorities = Annotated[
    list[Path] | None,
    typer.Option(
        "--authority",
        metavar="FILE",
        help="Certificate (PEM) that vouches for who may sign; repeatable.",
    ),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="The cache; by default that of this user."),
]


class InterruptionError(Exception):
    """Ctrl-C, where there is more to say than that nothing is left."""


def parse_size(text: str) -> int:
    """Bytes, from a number and a unit."""
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", text, re.ASCII)
    if match is None or match[2] not in UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write one like 3MB, 1.5MiB, 300k or 4096.")
    num_bytes = int(Decimal(match[1]) * UNITS[match[2]])
    if not 0 < num_bytes <= MAX_SIZE:
        raise typer.BadParameter(f"{text!r} is {num_bytes} bytes; give 1 to {MAX_SIZE}.")
    return num_bytes


def parse_seconds(text: str) -> float:
    """Seconds, more than none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise typer.BadParameter(f"{text!r} is no time; give seconds, such as 5 or 0.5.")
    return seconds


Patience = Annotated[
    float,
    typer.Option(
        parser=parse_seconds, metavar="SECONDS", help="Give up when nothing arrives for so long."
    ),
]


def parse_id(text: str) -> str:
    """The id of an artifact, as it stands in a receipt."""
    digits = text.removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise typer.BadParameter(
            f"{text!r} is no artifact id; give its 64 hexadecimal digits, in lower case."
        )
    return digits


ArtifactId = Annotated[
    str | None,
    typer.Option("--id", parser=parse_id, metavar="HEX", help="Id that the artifact must have."),
]


def refuse_together(**options: object) -> None:
    """Refuse a call that gives several of these options, of which each excludes the others."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other; give one of them.")


def note(sentence: str) -> None:
    """One line on stderr."""
    for argument, option in OPTIONS:
        sentence = re.sub(argument, option, sentence)
    typer.echo(f"plyweight: {sentence}", err=True)


def print_json(value: dict[str, Any]) -> None:
    """One object on one line of stdout."""
    typer.echo(json.dumps(value))


@contextlib.contextmanager
def needed_for(what: str, *, extra: str) -> Iterator[None]:
    """Say what to install where an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed; "
            f'install it with: pip install "plyweight[{extra}]"'
        ) from error


@contextlib.contextmanager
def spoken_warnings() -> Iterator[None]:
    """Show what nothing vouches for as one line, at once."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, TrustWarning):
            note(str(message))
        else:
            shown(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", TrustWarning)
        warnings.showwarning = show
        yield


def token() -> str | None:
    """For the server of an address; in the environment, as options show in lists of processes."""
    return os.environ.get(TOKEN) or None
