"""`plyweight` and `python -m plyweight`."""

import sys

__all__ = ["entry"]


def entry() -> None:
    """Run the command line; says how to install it where it is missing."""
    try:
        from plyweight.cli import main
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "click", "rich"):
            raise
        sys.exit(
            f"plyweight: the command line needs {error.name}, which is not installed; "
            'install it with: pip install "plyweight[cli]"'
        )
    sys.exit(main())


if __name__ == "__main__":
    entry()
