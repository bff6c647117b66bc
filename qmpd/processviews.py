"""What the API says of processes: why one cannot be reached, which there are, and what adopting one takes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from qmpd.spec import Name, Path
from qmpd.viewbase import Request, View


class TroubleView(View, frozen=True, kw_only=True):
    """Why a machine is `unreachable` or `unresponsive`: what the last of `attempts` failed with, since when, and when it was tried."""

    reason: str
    since: str
    tried_at: str
    attempts: int = 1


class AdoptedView(View, frozen=True, kw_only=True):
    """A machine that somebody else started. `fixed`: what qmpd cannot do or change while this QEMU lives. `unknown`: parts of it that
    the definition does not say, so that it cannot be started again from the definition."""

    at: str
    qmp: str
    fixed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class ProcessView(View, frozen=True, kw_only=True):
    """A QEMU of this host. `kind`: `machine` (one of ours), `stray` (holds the lock of one of our machines, and is not connected), or
    `foreign`. `machine` is the name for the first two. Secrets are taken out of `command`."""

    pid: int
    kind: Literal["machine", "stray", "foreign"]
    machine: str | None = None
    user: str
    started_at: str
    command: tuple[str, ...]
    qmp: tuple[str, ...] = ()


class AdoptRequest(Request, frozen=True, kw_only=True):
    """Take over the QEMU with this `pid`, or the one whose QMP monitor is the Unix socket `qmp` (or both), as the machine `name`."""

    pid: Annotated[int, Meta(ge=1, le=2**22)] | None = None
    qmp: Path | None = None
    name: Name | None = None


class ForgetRequest(Request, frozen=True, kw_only=True):
    """`confirm` is the machine's name once more: nothing looks after its process from then on."""

    confirm: str
