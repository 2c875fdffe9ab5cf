"""serve, fetch, cached, evict: from a folder to a device, and what it keeps."""

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plyweight.cli.calling import (
    AllowHttp,
    ArtifactId,
    AsJson,
    Authorities,
    CacheFolder,
    InterruptionError,
    Patience,
    PublicKey,
    note,
    parse_seconds,
    parse_size,
    print_json,
    refuse_together,
    spoken_warnings,
    token,
)
from plyweight.cli.show import cache_table, size, transfer_bar

if TYPE_CHECKING:
    from plyweight.delivery import Fetched, Progress

__all__ = ["cached", "evict", "fetch", "serve"]


def fetch(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="https://, http://, s3://, gs://, az://, hf://, or a path."
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Into a file, not the cache; more is added to it."),
    ] = None,
    bit_width: Annotated[
        int | None,
        typer.Option(
            "--bit-width", "-b", min=1, max=8, metavar="N", help="Exactly this bit-width."
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="The widest that is no larger, such as 3MB."
        ),
    ] = None,
    max_ram: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="The widest whose model takes no more memory."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            parser=parse_seconds,
            metavar="SECONDS",
            help="The widest that arrives in time, such as 5.",
        ),
    ] = None,
    artifact_id: ArtifactId = None,
    public_key: PublicKey = None,
    authorities: Authorities = None,
    sidecar: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of the signed sidecar; else ADDRESS.layers.json."),
    ] = None,
    cache: CacheFolder = None,
    allow_http: AllowHttp = False,
    allow_rollback: Annotated[
        bool, typer.Option("--allow-rollback", help="Accept an older revision than before.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask whether there is something newer.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read again what is here; damaged bytes come anew.")
    ] = False,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Requests at the same time.")
    ] = 4,
    max_waste: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="To drop where a server ignores byte ranges.  [default: 64MiB]",
        ),
    ] = None,
    patience: Patience = 120,
    as_json: AsJson = False,
) -> None:
    """Bring as much of an artifact as fits; only what is missing."""
    refuse_together(bit_width=bit_width, max_bytes=max_bytes)
    refuse_together(bit_width=bit_width, max_ram=max_ram)
    refuse_together(bit_width=bit_width, deadline=deadline)
    refuse_together(public_key=public_key, authority=authorities)
    if sidecar is not None and public_key is None and not authorities:
        raise typer.BadParameter("--sidecar needs --public-key or --authority to verify it with.")
    from plyweight.delivery import Cache
    from plyweight.delivery import fetch as fetch_artifact
    from plyweight.delivery.client import MAX_WASTE_BYTES

    kept_in = Cache(cache)
    seen: list[Progress] = []
    with spoken_warnings(), transfer_bar() as draw, _resumable(seen):

        def progress(state: "Progress") -> None:
            seen[:] = [state]
            draw(state)

        fetched = fetch_artifact(
            address,
            to,
            bit_width=bit_width,
            max_bytes=max_bytes,
            max_ram=max_ram,
            deadline_s=deadline,
            artifact_id=artifact_id,
            public_key=public_key,
            authorities=authorities or (),
            sidecar=sidecar,
            cache=kept_in,
            token=token(),
            allow_http=allow_http,
            allow_rollback=allow_rollback,
            refresh=refresh,
            verify=verify,
            parallel=parallel,
            max_waste_bytes=MAX_WASTE_BYTES if max_waste is None else max_waste,
            patience_s=patience,
            progress=progress,
        )
    _show_fetched(fetched, to, kept_in.folder, as_json=as_json)


def serve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Whose artifacts are served.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 for any that is free.")
    ] = 8000,
    as_json: AsJson = False,
) -> None:
    """Serve the artifacts of a folder on the local network."""
    from plyweight.delivery.server import FolderServer

    server = FolderServer(
        folder, host=host, port=port, on_request=lambda line: typer.echo(line, err=True)
    )
    try:
        with server:
            urls = server.addresses
            if as_json:
                print_json({"url": server.url, "artifacts": urls})
            else:
                typer.echo("\n".join(urls) or f"{server.url}  there is no artifact in it yet")
            note(
                "any object store, CDN or static server with byte ranges does as well; Ctrl-C "
                "ends this one."
            )
            if not _is_loopback(host):
                note(f"anybody who reaches {server.url} can read the artifacts.")
            server.wait()
    except KeyboardInterrupt:
        return  # how it is meant to end


def cached(cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """List what the cache holds."""
    from plyweight.delivery import Cache

    kept_in = Cache(cache)
    entries = kept_in.artifacts()
    num_bytes = kept_in.num_bytes
    if as_json:
        print_json(
            {
                "folder": str(kept_in.folder),
                "num_bytes": num_bytes,
                "artifacts": [asdict(entry) for entry in entries],
            }
        )
        return
    if entries:
        typer.echo(f"{cache_table(entries)}\n")
    typer.echo(f"{kept_in.folder} takes {size(num_bytes)} on the disk")


def evict(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="What it was fetched from, or its id.")
    ],
    keep: Annotated[
        int | None,
        typer.Option(min=1, max=8, metavar="N", help="Keep the layers up to this bit-width."),
    ] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Delete an artifact from the cache, or its last layers."""
    from plyweight.delivery import evict as evict_artifact

    freed = evict_artifact(address.removeprefix("sha256:"), keep_bit_width=keep, cache=cache)
    if as_json:
        print_json({"freed_bytes": freed})
        return
    typer.echo(f"{size(freed)} freed")


# --- fetch: what is said ------------------------------------------------------------------------


def _show_fetched(fetched: "Fetched", path: Path | None, cache: Path, *, as_json: bool) -> None:
    """What is here now and why, where, and what was moved for it."""
    from plyweight.artifact import ArtifactReader

    moved = fetched.transfer
    if as_json:
        print_json(
            {
                "artifact_id": fetched.header.artifact_id,
                "bit_width": fetched.bit_width,
                "reason": fetched.reason,
                "path": None if path is None else str(path),
                "cache": str(cache) if path is None else None,
                "held": list(ArtifactReader(fetched.artifact).held_bit_widths),
                "total_bytes": fetched.header.prefix_bytes(fetched.bit_width),
            }
            | asdict(moved)
        )
        return
    typer.echo(
        f"{path or cache}  {fetched.reason}  "
        f"{size(moved.received_bytes)} moved in {moved.seconds:.2f} s"
    )


@contextlib.contextmanager
def _resumable(seen: "list[Progress]") -> Iterator[None]:
    """Say how much is here when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not seen:
            raise InterruptionError(
                "interrupted; what had arrived before is still here, run it again to continue."
            ) from error
        raise InterruptionError(
            f"interrupted; {seen[0].bytes_done:,} of {seen[0].bytes_total:,} bytes are here, run "
            "it again to continue."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
