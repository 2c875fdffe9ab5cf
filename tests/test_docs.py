import re
from pathlib import Path

import pytest
import torch
from torch import nn

import plyweight
from plyweight import errors
from plyweight.cli import app, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands]


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def test_the_code_of_the_readme_runs_as_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])) for _ in range(2)]
    names = {"resnet18": SmallNet, "loader": loader}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert sorted(names["losses"]) == [2, 3, 4, 8]
    assert plyweight.bit_widths_of(names["net"]) == (2, 3, 4, 8)
    assert names["net"](loader[0][0]).shape == (4, 4)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_of_every_command_stands_in_its_page(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main([*([command] if command else []), "--help"])
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert shown in (ROOT / "docs" / "cli.md").read_text()


def test_the_tree_of_errors_is_drawn_whole():
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__))
    assert drawn == {name for name in errors.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_table_of_the_readme_is_the_one_that_was_measured():
    measured = (ROOT / "benchmarks" / "results" / "digits.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \| True \|$", measured, re.MULTILINE)
    assert len(rows) == 8
    readme = (ROOT / "README.md").read_text()
    assert all(f"| {bit_width} | {rest} |" in readme for bit_width, rest in rows)
