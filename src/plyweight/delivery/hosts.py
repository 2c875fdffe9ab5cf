"""Hosts: which address a name stands for, and where a redirect may lead.

Whoever answers a URL may send the client anywhere. A client inside a company or a data centre
reaches hosts that the server does not (its own loopback, the machines next to it, the metadata
service that gives out credentials), so an address is first sorted into a kind:

    global        anybody's: always allowed
    loopback      this machine
    private       the networks around it, and every other address that is not global
    link-local    the cable it hangs on
    metadata      where clouds answer questions about a machine

and a redirect leads to a kind that is not global only if the original address was of that kind.
"""

import ipaddress
import socket
import urllib.request
from typing import Literal

from plyweight.errors import SourceError, TransferError

__all__ = ["Kind", "is_proxied", "kind_of", "kinds_of", "says_loopback"]

Kind = Literal["global", "loopback", "private", "link-local", "metadata"]

# Some are global or private by their numbers alone.
METADATA = frozenset(
    map(
        ipaddress.ip_address,
        [
            "169.254.169.254",  # most clouds
            "169.254.170.2",  # AWS, containers
            "fd00:ec2::254",  # AWS
            "168.63.129.16",  # Azure
            "100.100.100.200",  # Alibaba
            "192.0.0.192",  # Oracle
        ],
    )
)
# IPv6 addresses that carry an IPv4 address, which is where the bytes end up.
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def kind_of(address: str) -> Kind:
    """The kind of a numeric address.

    Raises:
        ValueError: If it is not a numeric address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])  # fe80::1%eth0
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return kind_of(str(inner))
    if ip in METADATA:
        return "metadata"
    if ip.is_loopback or ip.is_unspecified:  # a connection to 0.0.0.0 ends at this machine
        return "loopback"
    if ip.is_link_local:
        return "link-local"
    return "global" if ip.is_global and not ip.is_multicast else "private"


def kinds_of(host: str, port: int) -> frozenset[Kind]:
    """The kinds of all addresses that ``host`` stands for now.

    Raises:
        TransferError: If no name server knows it, which may be different later.
        SourceError: If it is no name at all.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransferError(
            f"the host {host!r} has no address ({error}); check the name and the network."
        ) from error
    except UnicodeError as error:
        raise SourceError(f"{host!r} is not the name of a host; check the address.") from error
    return frozenset(kind_of(str(address[0])) for *_, address in found)


def says_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address as it stands, without asking a name server."""
    try:
        return kind_of(host) == "loopback"
    except ValueError:
        return host == "localhost"


def is_proxied(scheme: str, host: str) -> bool:
    """Whether the environment sends requests for that host through a proxy."""
    proxies = urllib.request.getproxies()
    configured = proxies.get(scheme) or proxies.get("all")
    return bool(configured) and not urllib.request.proxy_bypass(host)
