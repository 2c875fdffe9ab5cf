import contextlib
import io
import json
import re
from importlib.metadata import version
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
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
VOCABULARY = """
    bit-width; widest; narrowest; code; level; scale; half cell; decode; gain; pinned; granularity;
    calibrate; quantize; dequantize; fake quantization; straight-through estimator; latent weight;
    cascade downsampling; bit plane; layer; base layer; enhancement layer; module;
    side information; once-QAT; sandwich rule; switchable batch norm; bit allocation; checkpoint;
    artifact; header; digest; byte range; source; fetch; upgrade; load; export; reference kernel
"""


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


def test_the_code_of_the_method_prints_what_is_printed_below_it():
    blocks = r"```python\n(.*?)```\n\n```\n(.*?)```"
    found = re.findall(blocks, (ROOT / "docs" / "method.md").read_text(), re.DOTALL)
    assert found
    for code, wanted in found:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "method.md", "exec"), {})
        assert printed.getvalue() == wanted


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_of_every_command_stands_in_its_page(command, capsys, monkeypatch):
    pinned = re.search(r"^typer==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version("typer") != pinned[1]:
        pytest.skip(f"typer words the help; the page holds that of {pinned[1]}")
    monkeypatch.setenv("COLUMNS", "80")
    main([*([command] if command else []), "--help"])
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
    call = f"plyweight {command} --help".replace("  ", " ")
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"```text\n$ {call}\n{shown}\n```\n" in page


def test_every_command_has_a_section_of_its_page_with_an_example_and_there_are_no_others():
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "cli.md").read_text(), flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections] == COMMANDS
    for command, section in zip(COMMANDS, sections, strict=True):
        assert f"```console\n$ plyweight {command} " in section


def test_the_tree_of_errors_is_drawn_as_the_classes_inherit():
    drawn, above = {}, []  # by name the parent; the names on the path to the line above
    for indent, name in re.findall(r"^( +)(?:[x+] )?(\w+Error)\b", errors.__doc__, re.MULTILINE):
        depth = len(indent) // 2 - 2
        above = [*above[:depth], name]
        drawn[name] = above[depth - 1] if depth else None
    classes = {name: getattr(errors, name) for name in errors.__all__ if name.endswith("Error")}
    assert drawn.pop("PlyweightError") is None
    assert drawn == {
        name: cls.__bases__[0].__name__ for name, cls in classes.items() if name in drawn
    }
    assert {*drawn, "PlyweightError"} == set(classes)


def test_the_glossary_has_every_word_of_the_vocabulary():
    defined = set(re.findall(r"\*\*([^*]+)\*\*", GLOSSARY))
    assert {" ".join(term.split()) for term in VOCABULARY.split(";")} <= defined


def test_the_glossary_has_every_public_name_that_is_no_error():
    names = [name for name in plyweight.__all__ if not name.endswith("Error")]
    assert [name for name in names if f"`{name}`" not in GLOSSARY] == []


def test_the_glossary_names_only_what_is_in_the_code_or_planned():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    entries = re.findall(r"^(\*\*.*?)(?:\*Not:\*|\n\n|\Z)", GLOSSARY, re.DOTALL | re.MULTILINE)
    assert len(entries) >= 35
    for entry in entries:
        for name in re.findall(r"`([A-Za-z_]\w*)", entry):
            assert "*planned*" in entry or re.search(rf"\b{name}\b", source), (name, entry)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_tables_of_the_readme_are_those_that_were_measured():
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text()
    held_out = (results / "accuracy-resnet8.md").read_text().partition("official test images")[0]
    rows = re.findall(r"^(\| \d \| .*) \| [^|]* \|$", held_out, re.MULTILINE)
    assert len(rows) == 5
    assert all(f"{row} |\n" in readme for row in rows)  # all but the last column
    nets = re.findall(
        r"^\| resnet(\d+) \| ([\d.]+) \| (.*) \| \d+ \|$",
        (results / "calibration.md").read_text(),
        re.MULTILINE,
    )
    assert len(nets) == 4
    for depth, of_float, cells in nets:
        figures = re.sub(r" \([^)]*\)", "", cells)
        assert f"| ResNet-{depth} | {of_float} % | {figures} |" in readme


def test_the_engines_accuracies_in_the_readme_are_those_that_were_measured():
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text()
    cells = {}
    for net in ("resnet8", "resnet20"):
        rows = json.loads((results / f"agreement-{net}.json").read_text())["rows"]
        for row in rows:
            figures = [f"{row[key]:.2f} %" for key in ("agreement", "engine", "torch")]
            cells.setdefault(row["bit_width"], []).extend(figures)
            assert row["agreement"] >= (99.5 if row["bit_width"] >= 4 else 98.5)
            assert abs(row["engine"] - row["torch"]) <= 0.2
    lines = [f"| {b} | {' | '.join(found)} |\n" for b, found in cells.items() if len(found) == 6]
    assert len(lines) == 5
    assert all(line in readme for line in lines)


def test_the_speeds_of_kernels_are_medians_and_the_tables_those_of_the_json(monkeypatch):
    results = ROOT / "benchmarks" / "results"
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernels_tables import as_markdown, short

    found = json.loads((results / "kernels.json").read_text())
    page = (results / "kernels.md").read_text()
    assert page == as_markdown(found)  # python benchmarks/kernels.py --tables
    table = [line for line in short(found) if line.startswith("|")]
    assert len(table) >= 5
    assert "\n\n" + "\n".join(table) + "\n\n" in (ROOT / "README.md").read_text()
    median, fastest, _ = found["pieces"]["4096x4096 2"]["batches"]["1"]["seconds"][
        "ONNX Runtime 4 g128"
    ]
    assert median > fastest
    assert f" / {median * 1e3:.3g} ({fastest * 1e3:.3g}) / " in table[2]


def test_ratios_of_kernels_are_of_medians(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernels_tables import as_markdown

    seconds = {"torch float32": [8e-3, 1e-3, 9e-3], "torch bfloat16": [6e-3, 5e-3, 9e-3]}
    for group in ("-", "128", "32"):
        for bits in range(1, 9):
            seconds[f"plyweight int8 {bits} g{group}"] = [bits * 1e-3, 1e-4, 1.0]
            seconds[f"plyweight float {bits} g{group}"] = [4e-3, 1e-4, 1.0]
        for bits in (2, 4, 8):
            seconds[f"ONNX Runtime {bits} g{group}"] = [3e-3, 1e-4, 1.0]
    seconds |= {name: [1e-3, 1e-4, 1.0] for name in ("torch int4 g128", "torch int8")}
    piece = {
        "kernel": "avx512",
        "batches": {"1": {"rounds": 40, "seconds": seconds}},
        "weight_bytes": dict.fromkeys(seconds, 10**6),
        "bandwidth": {str(bits): 1e10 for bits in range(1, 9)},
        "conditions": {"seconds": 1.0, "machine": "a", "versions": {}, "date": "b"},
    }
    page = as_markdown({"pieces": {"32768x8192 2": piece}})
    assert (
        "| 32768x8192 | 2 | 2 | 2.000 (0.100) | 1.50 x | 2.000 (0.100) | 1.50 x | 4.0 x |" in page
    )
    # In "float" no shorter with fewer bits; and of as many bytes, which is not so, ever shorter.
    assert f"| 2 |{' 1.00 (0.25) |' * 3}{' 4.00 (1.00) |' * 3}" in page
    assert "| 0.5 | 5% | 3.00 x | 1.50 x |" in page  # beside bfloat16, both modes
    assert "4-6 µs of every call of ONNX Runtime" in page
