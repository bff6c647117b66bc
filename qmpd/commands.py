"""What may be sent to QEMU: a command as the bytes on its monitor, and how long its answer may take.

QEMU reports some malformed arguments without saying which command they belong to, which costs a client the whole session and
every other command on it. So nothing reaches QEMU that its parser could stumble over: numbers are finite and fit its integers,
strings hold only characters its UTF-8 decoder takes, and the depth and size of a message are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

from qmpd.errors import Problem, TooLarge, invalid

#: Longest command on the wire. QEMU reads its monitor byte by byte (about 160 KB/s), and no command needs more.
COMMAND_LIMIT: Final = 64 * 1024
#: Deepest nesting of arguments. QEMU's own limit is 1024; block device graphs, the deepest real arguments, stay below 20.
DEPTH_LIMIT: Final = 64
#: Characters of the caller's text that an error message repeats.
_ECHO_LIMIT: Final = 64

#: A query answers from memory: a QEMU that needs longer has a blocked main loop.
QUERY_DEADLINE_S: Final = 5.0
#: What changes something may flush disks or plug devices, on slow storage.
CHANGE_DEADLINE_S: Final = 60.0
#: `quit` is answered before the disks are closed, but behind whatever the main loop does.
QUIT_DEADLINE_S: Final = 60.0

#: What commands are called. Such a name alone is nothing that QEMU's parser could stumble over.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_QUERY: Final = re.compile(r"(x-)?query-.*|qom-(get|list|list-properties|list-types)|device-list-properties|qmp_capabilities")

#: What `json.dumps` with arguments makes anew for every call.
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_INTEGER_MIN: Final = -(2**63)
_INTEGER_MAX: Final = 2**64 - 1
#: Surrogates and Unicode's noncharacters: QEMU's decoder takes either for a broken message.
_FORBIDDEN_TEXT: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)


def deadline_for(command: str) -> float:
    """Seconds within which the answer to `command` is due, by its class: query, change or quit."""
    if command == "quit":
        return QUIT_DEADLINE_S
    return QUERY_DEADLINE_S if _QUERY.fullmatch(command) else CHANGE_DEADLINE_S


def encode(command: str, arguments: Mapping[str, object] | None, *, ident: str, oob: bool = False) -> bytes:
    """The command as one message for QEMU, answered under `ident`.

    Raises:
        Invalid: something in it would break QEMU's parser; carries every problem with its path.
        TooLarge: it is longer than COMMAND_LIMIT.
    """
    verb = "exec-oob" if oob else "execute"
    if arguments is None and _PLAIN.fullmatch(command):
        return b'{"%b": "%b", "id": "%b"}' % (verb.encode(), command.encode(), ident.encode())
    message: dict[str, object] = {verb: command, "id": ident}
    problems = list(_problems("$.execute", command))
    if arguments is not None:
        message["arguments"] = arguments
        problems += _problems("$.arguments", arguments)
    if problems:
        raise invalid(problems)
    encoded = _ENCODER.encode(message).encode("ascii")
    if len(encoded) > COMMAND_LIMIT:
        raise _too_large()
    return encoded


def _too_large() -> TooLarge:
    return TooLarge(f"a QMP command may be {COMMAND_LIMIT} bytes long, this one is longer", limit=COMMAND_LIMIT)


def _problems(path: str, value: object) -> Iterator[Problem]:
    pending: list[tuple[str, object, int]] = [(path, value, 0)]
    seen = 0
    while pending:
        where, item, depth = pending.pop()
        seen += 1
        if seen > COMMAND_LIMIT:  # every value takes at least a byte
            raise _too_large()
        if isinstance(item, Mapping | list | tuple):
            if depth == DEPTH_LIMIT:
                yield Problem(path=where, message=f"arguments may nest {DEPTH_LIMIT} deep, these are deeper")
                continue
            pending += [(inner, member, depth + 1) for inner, member in _members(where, item)]
            if isinstance(item, Mapping):
                yield from _key_problems(where, item)
        elif problem := _scalar_problem(item):
            yield Problem(path=where, message=problem)


def _members(path: str, value: Mapping[object, object] | list[object] | tuple[object, ...]) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        members = [(f"{path}.{_echo(key)}", member) for key, member in value.items()]
    else:
        members = [(f"{path}[{index}]", member) for index, member in enumerate(value)]
    return members[::-1]  # taken from the end of a stack, and problems are listed in the document's order


def _key_problems(path: str, value: Mapping[object, object]) -> Iterator[Problem]:
    for key in value:
        if not isinstance(key, str):
            yield Problem(path=path, message=f"the name {_echo(key)} is a {type(key).__name__}, names are strings")
        elif problem := _scalar_problem(key):
            yield Problem(path=path, message=f"the name {_echo(key)}: {problem}")


def _scalar_problem(value: object) -> str | None:
    match value:
        case None | bool():
            return None
        case str():
            found = _FORBIDDEN_TEXT.search(value)
            return f"U+{ord(found[0]):04X} is not a character that QEMU takes" if found else None
        case int():
            return None if _INTEGER_MIN <= value <= _INTEGER_MAX else "the number does not fit QEMU's 64-bit integers"
        case float():
            return None if math.isfinite(value) else "QMP has no NaN and no infinity"
    return f"QMP has no {type(value).__name__}"


def _echo(key: object) -> str:
    return ascii(key)[1 : _ECHO_LIMIT + 1].rstrip("'\"") if isinstance(key, str) else type(key).__name__
