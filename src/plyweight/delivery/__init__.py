"""Moving bytes: any prefix of an artifact, from wherever it is, verified before it is used.

    fetch(url, bit_width=4)            what is missing of a prefix, into the cache or a file
    evict(url, keep_bit_width=2)       give the disk back
    serve(folder)                      a folder over HTTP with byte ranges

    address ─ source ─► Reply ─ client ─► verified chunks ─ cache / standing ─► layers on disk

Needs numpy and the standard library; what speaks HTTP, to object stores or to the Hub is imported
when an address asks for it.
"""

from plyweight.delivery.cache import Cache, CachedArtifact, CachedEntry
from plyweight.delivery.client import FoundHeader
from plyweight.delivery.fetch import (
    Fetched,
    FetchOptions,
    evict,
    fetch,
    fetch_header,
    is_remote,
)
from plyweight.delivery.source import RemoteSource, Reply, open_remote
from plyweight.delivery.transfer import Progress, Transfer

__all__ = [
    "Cache",
    "CachedArtifact",
    "CachedEntry",
    "FetchOptions",
    "Fetched",
    "FoundHeader",
    "Progress",
    "RemoteSource",
    "Reply",
    "Transfer",
    "evict",
    "fetch",
    "fetch_header",
    "is_remote",
    "open_remote",
]
