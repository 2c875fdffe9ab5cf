"""What a person types. One function for each command; what a command needs is imported in it.

    making        demo, pack
    artifacts     inspect, verify, export, split, join, sign
    delivering    fetch, serve, cached, evict
    running       run, bench
    installed     info

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 it failed, 2 it was
called wrongly, 130 interrupted. An error is one sentence; ``--debug`` shows where it came from.
"""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from plyweight.cli.artifacts import export, inspect, join, sign, split, verify
from plyweight.cli.calling import InterruptionError, note
from plyweight.cli.delivering import cached, evict, fetch, serve
from plyweight.cli.installed import info
from plyweight.cli.making import demo, pack
from plyweight.cli.running import bench, run
from plyweight.errors import PlyweightError

__all__ = ["app", "main"]

app = typer.Typer(
    help="One layered file for every bit-width.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts faster, and docs/cli.md holds it as it is
)

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (``sys.argv[1:]`` if None); the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments, prog_name="plyweight", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except InterruptionError as interruption:
        note(str(interruption))
        return INTERRUPTED
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # Called wrongly: click's exceptions, of which typer has a private copy.
            error.show()
            return int(error.exit_code)
        if not isinstance(error, (PlyweightError, ImportError, OSError)):
            raise
        if "--debug" in arguments:
            typer.echo(traceback.format_exc(), err=True)
        note(str(error))
        return 1
    if code == INTERRUPTED:  # which typer returns by itself, without a word
        note("interrupted; nothing half-written is left.")
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        from plyweight import __version__

        typer.echo(f"plyweight {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """One layered file for every bit-width."""


# In the order of the help: how a model is made, looked at, published and used.
app.command()(demo)
app.command()(pack)
app.command()(inspect)
app.command()(verify)
app.command()(export)
app.command()(split)
app.command()(join)
app.command()(sign)
app.command()(serve)
app.command()(fetch)
app.command()(cached)
app.command()(evict)
app.command()(run)
app.command()(bench)
app.command()(info)
