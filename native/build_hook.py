"""How the native library is built: by pip, where a C++ compiler is, and by hand.

    pip install …                     builds it if it can; else the package is pure Python
    PLYWEIGHT_NATIVE=require pip …    … or fails, with what the compiler said
    PLYWEIGHT_NATIVE=skip pip …       pure Python
    python native/build_hook.py       builds it again into src/, for who works on it

A package without the library works, in numpy. That it is missing is never hidden: a note with the
reason is installed in its place, and ``plyweight info`` shows it.

Hatchling calls :class:`NativeBuildHook` for every wheel. An editable install gets the library next
to the Python sources, in ``src/plyweight``, so that a working tree is complete by itself:
``PYTHONPATH=src`` is enough, and the tree of one branch never runs the library of another.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).resolve().parent
PACKAGE = SOURCES.parent / "src" / "plyweight"
LIBRARY = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
NOTE = "_native_missing.txt"  # why there is no library; plyweight.native reads it

MODE = "PLYWEIGHT_NATIVE"
MODES = ("auto", "require", "skip")
NANOBIND = "nanobind>=3"  # the series checked
CMAKE = "cmake>=3.18"  # as native/CMakeLists.txt asks
NINJA = "ninja>=1.10"
COMPILERS = ("c++", "g++", "clang++")


class NotBuiltError(Exception):
    """The library cannot be built; says why in a sentence."""


def mode() -> str:
    """What the environment wants."""
    wanted = os.environ.get(MODE) or "auto"
    if wanted not in MODES:
        raise SystemExit(f"{MODE} is {wanted!r}; set it to one of {', '.join(MODES)}.")
    return wanted


def check_compiler() -> None:
    """Raise if there is no C++ compiler, before anything is fetched for it."""
    if sys.platform == "win32":
        return  # CMake knows where Visual Studio is; it is not on the path
    named = os.environ.get("CXX")
    names = (shlex.split(named)[0],) if named else COMPILERS
    if not any(map(shutil.which, names)):
        asked = f"CXX names {named}, which is not there" if named else "there is no C++ compiler"
        raise NotBuiltError(f"{asked} (looked for {', '.join(names)})")


def requirements() -> list[str]:
    """What has to be fetched to build the library here."""
    if mode() == "skip":
        return []
    try:
        check_compiler()
    except NotBuiltError:
        return []
    wanted = [NANOBIND]
    if not shutil.which("cmake"):
        wanted.append(CMAKE)
    if sys.platform != "win32" and not any(map(shutil.which, ("ninja", "make"))):
        wanted.append(NINJA)
    return wanted


def sources_digest() -> str:
    """Of everything the library is made of; it says so itself when it is imported."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.[ch]pp"), SOURCES / "CMakeLists.txt"]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def build(folder: Path, *, options: Sequence[str] = ()) -> Path:
    """Build the library in ``folder``; ``options`` go to CMake.

    Raises:
        NotBuiltError: If that cannot be done here.
    """
    check_compiler()
    try:
        import nanobind
    except ModuleNotFoundError as error:
        raise NotBuiltError("nanobind is not installed") from error
    configure = [
        *("cmake", "-S", str(SOURCES), "-B", str(folder)),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_DIR={nanobind.cmake_dir()}",
        f"-DPLYWEIGHT_SOURCES={sources_digest()}",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        *options,
    ]
    _run(configure)
    _run(["cmake", "--build", str(folder), "--config", "Release", "--parallel"])
    found = sorted(folder.rglob(LIBRARY))
    if len(found) != 1:
        raise NotBuiltError(f"{len(found)} files {LIBRARY} came out of the build")
    return found[0]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise NotBuiltError(f"{command[0]} cannot be run ({error})") from error
    print(done.stdout)  # pip shows it with -v
    if done.returncode:
        raise NotBuiltError(f"`{' '.join(command[:2])}` failed: {_complaint(done.stdout)}")


def _complaint(output: str) -> str:
    """The first error in what CMake or a compiler said, as one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):  # its place; the sentence comes in the lines below
            return " ".join(lines[index + 1 : index + 4]) or line
        if "error:" in line:
            return line
    return lines[-1] if lines else "it said nothing"


def place(library: Path) -> Path:
    """Put the library next to the Python sources."""
    target = PACKAGE / LIBRARY
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(library, scratch)
    scratch.replace(target)  # a running process keeps the file it has mapped
    (PACKAGE / NOTE).unlink(missing_ok=True)
    return target


class NativeBuildHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, or a note why it is not in it."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What pip fetches into the environment of the build."""
        return requirements()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build; ``version`` is "editable" or "standard"."""
        wanted, is_editable = mode(), version == "editable"
        self.scratch = tempfile.TemporaryDirectory(prefix="plyweight-native-")
        folder = Path(self.scratch.name)
        try:
            if wanted == "skip":
                raise NotBuiltError(f"it was installed with {MODE}=skip")
            library = build(folder / "build")
        except NotBuiltError as error:
            if wanted == "require":
                raise SystemExit(f"the native library is required ({MODE}), but {error}") from error
            self.app.display_warning(f"without the native library: {error}")
            if is_editable:
                (PACKAGE / LIBRARY).unlink(missing_ok=True)  # of other sources, by now
                (PACKAGE / NOTE).write_text(f"{error}\n")
            else:
                (folder / NOTE).write_text(f"{error}\n")
                build_data["force_include"][str(folder / NOTE)] = f"plyweight/{NOTE}"
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if is_editable:
            place(library)
        else:
            build_data["force_include"][str(library)] = f"plyweight/{LIBRARY}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Clean up."""
        self.scratch.cleanup()


def main() -> None:
    """Build into src/, or elsewhere."""
    parser = argparse.ArgumentParser(description="Build the native library again, into src/.")
    parser.add_argument("--folder", type=Path, default=SOURCES.parent / "build" / "native")
    parser.add_argument("--only", action="store_true", help="leave it in the folder")
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    arguments = parser.parse_args()
    try:
        library = build(arguments.folder, options=arguments.options)
    except NotBuiltError as error:
        raise SystemExit(f"the native library cannot be built: {error}") from error
    print(library if arguments.only else place(library))


if __name__ == "__main__":
    main()
