"""info: what is installed here, and which kernels therefore run, without torch."""

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

import typer

from plyweight import native
from plyweight.cli.calling import AsJson, print_json
from plyweight.cli.show import table
from plyweight.kernels import pick
from plyweight.kernels.picking import triton_missing_because

__all__ = ["info"]

EXTRA = re.compile(r"""(?P<package>[\w.-]+)[^;]*;.*\bextra\s*==\s*["'](?P<extra>[\w-]+)["']""")
FOR_DEVELOPERS = ("dev",)


def info(as_json: AsJson = False) -> None:
    """Show what is installed here, and which kernels run and why."""
    versions = {name: version(name) for name in ("plyweight", "numpy")}
    extras = _extras()
    triton = triton_missing_because("cuda")
    if as_json:
        choice, products = native.choose(), pick()
        print_json(
            {
                "version": versions["plyweight"],
                "python": platform.python_version(),
                "numpy": versions["numpy"],
                "machine": f"{platform.system()} {platform.machine()}",
                "extras": extras,
                "native": {
                    "is_built": native.missing_because() is None,
                    "missing_because": native.missing_because(),
                    "cpu_features": list(native.cpu_features()),
                    "available": list(native.available()),
                    "demanded": native.demanded(),
                    "kernels": {
                        "planes": {"kernel": choice.kernel, "why": choice.why},
                        "products": {"kernel": products.name, "why": products.reason},
                    },
                },
                "triton": {"is_there": triton is None, "missing_because": triton},
            }
        )
        return
    typer.echo(
        f"plyweight {versions['plyweight']}  Python {platform.python_version()}  "
        f"numpy {versions['numpy']}  {platform.system()} {platform.machine()}\n"
    )
    rows = [
        (extra, ", ".join(f"{name} {found or '(missing)'}" for name, found in packages.items()))
        for extra, packages in extras.items()
    ]
    typer.echo(table(("extra", "packages"), rows, left={0, 1}))
    reason = native.missing_because()
    typer.echo(f"\nnative library  {'built' if reason is None else f'missing: {reason}'}")
    if reason is None:
        typer.echo(f"processor       {' '.join(native.cpu_features()) or 'nothing special'}")
    typer.echo(f"kernels here    {' '.join(native.available())}")
    # Last: if something is demanded that does not run here, this is an error, and says so.
    choice, products = native.choose(), pick()
    typer.echo(f"planes          {choice.kernel}: {choice.why}")
    typer.echo(f"products        {products.name}: {products.reason}")
    typer.echo(f"on a GPU        {'triton' if triton is None else f'none: {triton}'}")
    if reason is not None:
        typer.echo(f"\n{native.ADVICE}")


def _extras() -> dict[str, dict[str, str | None]]:
    """By extra, what it installs and the versions that are here; None where one is missing."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in requires("plyweight") or ():
        match = EXTRA.match(requirement)
        if match and match["extra"] not in FOR_DEVELOPERS and match["package"] != "plyweight":
            found.setdefault(match["extra"], {})[match["package"]] = _version(match["package"])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
