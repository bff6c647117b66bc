"""Who asks, what they may do, and which QMP commands they may pass through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

import msgspec

from qmpd.errors import Forbidden, Invalid, Problem, Unauthorized

#: What somebody is to this daemon: another daemon, or a person or program in one of three roles.
Role = Literal["peer", "admin", "operator", "viewer"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
#: The roles of people and programs.
Personal = Literal["admin", "operator", "viewer"]
PERSONAL: Final[tuple[Personal, ...]] = get_args(Personal)
#: What a request needs: to look, to use what is there, to change definitions, to do anything; `peer` is for other daemons, `known` for
#: everybody who is somebody, and `join` for hosts that have nothing yet but an invitation, which the request itself carries.
Right = Literal["read", "operate", "define", "admin", "peer", "known", "join"]

RIGHTS: Final[dict[Role, frozenset[Right]]] = {
    "viewer": frozenset({"known", "read"}),
    "operator": frozenset({"known", "read", "operate"}),
    "admin": frozenset({"known", "read", "operate", "define", "admin"}),
    "peer": frozenset({"known", "peer"}),
}


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who is at the other end of the API connection, and in which role; None: nobody who is known.

    On the Unix socket the kernel names the process, and whoever may open the socket is an admin. Over TLS it is the owner of a
    token or certificate at `address`; `credential` is the token's id, or the certificate's serial number,
    and `peer` its name in the settings, where it is another daemon. `labels`: only machines that
    carry all of them exist for this caller. `unrestricted`: may send any QMP command.
    """

    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    user: str | None = None
    role: Role | None = None
    labels: Mapping[str, str] = {}
    address: str | None = None
    peer: str | None = None
    credential: str | None = None
    unrestricted: bool = False


#: The daemon itself, and who speaks for it.
OURSELVES: Final = Caller(role="admin")


def check_right(caller: Caller, right: Right) -> None:
    """Raises Unauthorized for somebody unknown, Forbidden for somebody whose role does not have the right."""
    if right == "join":
        return
    if caller.role is None:
        raise Unauthorized("this needs a token, or a certificate of this daemon's authority")
    if right not in RIGHTS[caller.role]:
        allowed = [role for role in ROLES if right in RIGHTS[role]]
        message = f"{caller.user or 'this caller'} is {caller.role}; this is for {' or '.join(allowed)}"
        raise Forbidden(message, role=caller.role, allowed=allowed)
    if caller.role == "peer" and caller.peer is None:
        raise Forbidden(f"{caller.user or 'this caller'} shows no certificate of a peer that this daemon knows", role=caller.role)


def in_scope(labels: Mapping[str, str], caller: Caller) -> bool:
    """Whether a machine with these labels exists for this caller."""
    return caller.labels.items() <= labels.items()


#: Commands that only read, beside all `query-` ones.
READING: Final = frozenset({"qom-get", "qom-list", "qom-list-types"})

#: Never passed through: they would change the monitor session itself, or need file descriptors.
OWN: Final = frozenset({"qmp_capabilities", "getfd", "add-fd", "closefd", "remove-fd", "add_client"})
#: Commands that may be sent out of band (QMP specification, "allow-oob" in the schema).
OUT_OF_BAND: Final = frozenset({"migrate-pause", "migrate-recover", "query-yank", "yank"})


def only_reads(command: str) -> bool:
    """Whether a command is known to change nothing."""
    return command.startswith("query-") or command in READING


def check_command(command: str, caller: Caller, *, oob: bool) -> None:
    """Raises Forbidden or Invalid when this caller may not send this command."""
    if command in OWN:
        raise Forbidden(f"{command} belongs to qmpd's own monitor session and is never passed through", command=command)
    if oob and command not in OUT_OF_BAND:
        known = ", ".join(sorted(OUT_OF_BAND))
        raise Invalid(
            f"{command} cannot be sent out of band; these can: {known}",
            [Problem(path="$.oob", message=f"only {known} can be sent out of band")],
        )
    if caller.unrestricted or (only_reads(command) and not oob):
        return
    who = caller.user or (f"uid {caller.uid}" if caller.uid is not None else "this caller")
    raise Forbidden(f"{who} may send only QMP commands that read; {command} needs the setting qmp_users", command=command)
