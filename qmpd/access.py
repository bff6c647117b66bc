"""Who asks, and which QMP commands they may pass through."""

from __future__ import annotations

from typing import Final

import msgspec

from qmpd.errors import Forbidden, Invalid, Problem


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The process at the other end of the API connection. `unrestricted`: may send any QMP command."""

    uid: int | None = None
    gid: int | None = None
    pid: int | None = None
    user: str | None = None
    unrestricted: bool = False


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
