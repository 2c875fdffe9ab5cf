"""The public face: what ``plyweight`` offers, where it lives, and what it costs to import."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import plyweight


def run(code: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", plyweight.__all__)
def test_every_public_name_resolves_to_the_object_in_its_home(name):
    value = getattr(plyweight, name)
    assert value.__name__ == name
    assert value.__module__ == plyweight._HOMES[name]


def test_public_names_are_sorted():
    assert plyweight.__all__ == sorted(plyweight.__all__)


def test_every_public_name_has_a_home_and_every_home_a_public_name():
    assert list(plyweight._HOMES) == plyweight.__all__


def test_the_type_checker_sees_every_name_in_the_home_it_resolves_to():
    (block,) = (
        node
        for node in ast.parse(inspect.getsource(plyweight)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == plyweight._HOMES


def test_dir_lists_every_public_name_before_any_is_used():
    listed = run("import plyweight; print(*dir(plyweight))").split()
    assert {*plyweight.__all__, "__version__"} <= set(listed)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'plyweight' has no attribute 'unpack'"):
        plyweight.unpack  # noqa: B018


def test_the_version_is_the_installed_one():
    assert plyweight.__version__ == importlib.metadata.version("plyweight")


def test_importing_plyweight_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'typer', 'rich', 'sklearn', 'matplotlib'}"
    assert run(f"import sys, plyweight; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    "use",
    [
        "import plyweight.cli",
        "import plyweight; plyweight.inspect",
        "import plyweight; plyweight.open",
        "import plyweight; plyweight.verify",
        "import plyweight; plyweight.PlyweightError",
    ],
)
def test_handling_bytes_leaves_torch_unimported(use):
    assert run(f"import sys\n{use}\nprint('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", ["prepare", "JointObjective", "pack", "load"])
def test_without_torch_a_name_that_needs_it_says_so_in_one_sentence(name):
    # None in sys.modules makes `import torch` fail as if it were not installed.
    message = run(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import plyweight\n"
        f"try: plyweight.{name}\n"
        "except ImportError as error: print(error)"
    )
    assert message == (
        f"plyweight.{name} needs PyTorch, which is not installed; "
        'install it with: pip install "plyweight[train]"'
    )


def test_another_missing_package_is_reported_as_itself():
    message = run(
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import plyweight\n"
        "try: plyweight.inspect\n"
        "except ImportError as error: print(error.name)"
    )
    assert message == "numpy"
