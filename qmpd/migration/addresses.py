"""Where the data of a migration goes: to a port, or to a Unix socket that leads on."""

from __future__ import annotations

import ipaddress
import re
from typing import Final, TypeAlias

import msgspec

from qmpd.errors import Problem, invalid

#: A host name (RFC 1123); everything else would be an option of QEMU's address.
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


class TcpAddress(msgspec.Struct, frozen=True, kw_only=True, tag="tcp", forbid_unknown_fields=True):
    """A port of a host."""

    host: str
    port: int


class UnixAddress(msgspec.Struct, frozen=True, kw_only=True, tag="unix", forbid_unknown_fields=True):
    """A Unix socket."""

    path: str


class TcpRange(msgspec.Struct, frozen=True, kw_only=True, tag="tcp-range", forbid_unknown_fields=True):
    """The ports one may listen at, the first that is free is taken."""

    host: str
    first: int
    last: int


Address: TypeAlias = TcpAddress | UnixAddress
Listening: TypeAlias = TcpRange | UnixAddress


def uri(address: Address | Listening) -> str:
    """The address as `migrate` and `migrate-incoming` take it. Raises Invalid for what would mean something else to QEMU."""
    if isinstance(address, UnixAddress):
        return f"unix:{_path(address.path)}"
    if isinstance(address, TcpRange):
        return f"tcp:{_bracketed(address.host)}:{_port(address.first)},to={_port(address.last)}"
    return f"tcp:{_bracketed(address.host)}:{_port(address.port)}"


def socket_address(address: Address) -> dict[str, object]:
    """The address as QEMU's `SocketAddress`, the flat form."""
    if isinstance(address, UnixAddress):
        return {"type": "unix", "path": _path(address.path)}
    _bracketed(address.host)
    return {"type": "inet", "host": address.host, "port": str(_port(address.port))}


def legacy_address(address: Address) -> dict[str, object]:
    """The address as QEMU's `SocketAddressLegacy`."""
    flat = socket_address(address)
    return {"type": flat.pop("type"), "data": flat}


def _bracketed(host: str) -> str:
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        if _HOST.fullmatch(host) is None:
            raise invalid([Problem(path="$.host", message=f"is neither a host name nor an address: {host[:80]!r}")]) from None
        return host
    return f"[{host}]" if parsed.version == 6 else host


def _port(port: int) -> int:
    if not 0 < port < 65536:
        raise invalid([Problem(path="$.port", message=f"must be between 1 and 65535, not {port}")])
    return port


def _path(path: str) -> str:
    if not path.startswith("/"):
        raise invalid([Problem(path="$.path", message=f"must be absolute: {path[:80]!r}")])
    return path
