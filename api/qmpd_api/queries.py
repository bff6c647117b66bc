"""The query strings of the API: one small type per route that takes one, and the decoding of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Final, TypeVar, get_origin

import msgspec
from msgspec import Meta
from multidict import MultiMapping

from qmpd.errors import Problem, QmpdError, invalid
from qmpd.lifecycle import State
from qmpd.migration.protocol import Channel
from qmpd.spec import MAX_LABELS, Name, Word
from qmpd_api.codec import check_values
from qmpd_api.echo import echo, placed
from qmpd_api.limits import Limits

Q = TypeVar("Q", bound=msgspec.Struct)

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
SerialIndex = Annotated[int, Meta(ge=0, le=3)]

#: One page of events: about 200 KiB.
MAX_PAGE: Final = 1000
#: How long a request may wait for a state. Longer waits belong into the event stream.
MAX_WAIT_S: Final = 3600.0


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the query types; as it is, the query of a route that takes none."""


class BoardsQuery(Query, frozen=True, kw_only=True):
    """`arch`: only the boards of this architecture."""

    arch: Word | None = None


class MachinesQuery(Query, frozen=True, kw_only=True):
    """`label` (`key=value`, any number): only machines that carry it; `state`: only machines in it."""

    label: Annotated[tuple[Annotated[str, Meta(pattern=r"^[^=]+=", max_length=512)], ...], Meta(max_length=MAX_LABELS)] = ()
    state: State | None = None

    def labels(self) -> Mapping[str, str]:
        """The labels by key."""
        return {key: value for key, _, value in (label.partition("=") for label in self.label)}


class CreateQuery(Query, frozen=True, kw_only=True):
    """`start`: launch it as well; `paused`: but leave it halted before its first instruction."""

    start: bool = False
    paused: bool = False


class TunnelQuery(Query, frozen=True, kw_only=True):
    """`channel`: which of QEMU's connections comes through."""

    channel: Channel


class WaitQuery(Query, frozen=True, kw_only=True):
    """`state` (one or more): what to wait for; `timeout_s`: for how long."""

    state: Annotated[tuple[State, ...], Meta(min_length=1, max_length=len(State))]
    timeout_s: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 60.0


class ConsoleQuery(Query, frozen=True, kw_only=True):
    """`port`: which serial port; `since`: the offset to begin at; `scrollback`: or how many bytes before the end. Neither: the end."""

    port: SerialIndex | None = None
    since: Number | None = None
    scrollback: Number | None = None


class LogQuery(Query, frozen=True, kw_only=True):
    """`port`: which serial port; `since`: the offset to begin at; `limit`: how many bytes at most; `follow`: wait for more."""

    port: SerialIndex | None = None
    since: Number = 0
    limit: Number | None = None
    follow: bool = False


class EventsQuery(Query, frozen=True, kw_only=True):
    """`since`: only later events; without it a page begins at the oldest kept event, and a stream with the next one."""

    since: Number | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100
    machine: Name | None = None


class ItemQuery(Query, frozen=True, kw_only=True):
    """`offset`: where in the item the piece begins; of a log, the number of its first byte."""

    offset: Number


class JobsQuery(Query, frozen=True, kw_only=True):
    """`machine`: only the jobs of this machine."""

    machine: Name | None = None


class AuditQuery(Query, frozen=True, kw_only=True):
    """`since` (RFC 3339, with a zone): only later ones; `machine`, `who` (a name, or a credential): only their entries."""

    since: Annotated[datetime, Meta(tz=True)] | None = None
    machine: Name | None = None
    who: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = 100


def decode_query(given: MultiMapping[str], kind: type[Q], limits: Limits) -> Q:
    """The query string as a `kind`; raises Invalid with every problem, each at `?name`."""
    fields = _fields(kind)
    values: dict[str, object] = {}
    unknown = [name for name in given if name not in fields]
    problems = [_problem(name, f"there is no such parameter; known are: {', '.join(fields) or 'none'}") for name in unknown]
    for name, field in fields.items():
        texts = given.getall(name, [])
        if not texts:
            if field.required:
                problems.append(_problem(name, "is required"))
            continue
        try:
            values[name] = _value(texts, field.type, limits)
        except (QmpdError, msgspec.ValidationError) as error:
            problems.append(_problem(name, placed(str(error))[1]))
    if problems:
        raise invalid(problems)
    return kind(**values)


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """What msgspec takes longer to say than the rest of a request takes."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _value(texts: list[str], kind: object, limits: Limits) -> object:
    if any(len(text) > limits.query_characters for text in texts):
        raise msgspec.ValidationError(f"longer than {limits.query_characters} characters")
    check_values(texts, "the value")
    if _is_list(kind):
        return msgspec.convert(texts, type=kind, strict=False)
    if len(texts) > 1:
        raise msgspec.ValidationError("is given more than once")
    return msgspec.convert(texts[0], type=kind, strict=False)


def _is_list(kind: object) -> bool:
    plain = getattr(kind, "__origin__", kind) if get_origin(kind) is Annotated else kind
    return get_origin(plain) is tuple


def _problem(name: str, message: str) -> Problem:
    return Problem(path=f"?{echo(name)}", message=message)
