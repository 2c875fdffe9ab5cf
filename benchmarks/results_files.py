"""How a benchmark leaves what it found: a page for people, and all numbers as JSON beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plyweight.artifact import publish_atomically

__all__ = ["write_results"]


def write_results(folder: Path, name: str, page: str, content: Mapping[str, Any]) -> None:
    """``name``.md and ``name``.json in ``folder``, which is made; neither is ever half there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    for ending, made in (("md", page), ("json", text)):
        with publish_atomically(folder / f"{name}.{ending}") as file:
            file.write(made.encode())
