"""Compare-and-write storage of the authority records: definitions, who owns which machine, wanted state, peers.

This is an interface, and it promises little on purpose: one host keeps its records in SQLite (`qmpd.sqlite`), a fleet keeps
them in a replicated engine, and callers must not be able to tell. What they may rely on is written here and nowhere else:

* A commit happens entirely or not at all, and only if every guard holds at that instant.
* Revisions only rise. All keys written by one commit carry that commit's revision.
* `Lost` is the only answer that says "it did not happen because somebody else was first". After `Unknown` it may have
  happened, or may still happen: read again, and settle doubt with a commit that conflicts, never with the read alone.
* A watch can be late without saying so. Permission to do something is a committed write, never something seen in a watch.

The exceptions (`Lost` is a conflict, the others are meant for the caller's code)::

    QmpdError
    ├── Conflict
    │   └── Lost             a guard did not hold; nothing was written
    ├── Unknown              no answer, or one that proves nothing: read again
    └── Gap                  changes that were asked for are no longer kept: read again, then watch from there
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Final, Protocol

import msgspec

from qmpd.errors import Conflict, QmpdError, TooLarge

#: Every engine takes keys of this size; ours are a few dozen characters.
MAX_KEY_BYTES: Final = 512
#: Keys and values of one commit together. etcd refuses requests over 1.5 MiB, of which base64 takes a third.
MAX_COMMIT_BYTES: Final = 1 << 20
#: Guards, and writes, of one commit: etcd's default limit of operations in a transaction.
MAX_OPERATIONS: Final = 128

_KEY: Final = re.compile(r"[!-~]+\Z")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A value, and the revision of the commit that wrote it."""

    value: bytes
    revision: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All records under a prefix as they were together at `revision`."""

    revision: int
    records: dict[str, Record]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A key got a value, or was deleted (`value` None), by the commit of this revision."""

    key: str
    value: bytes | None
    revision: int


class Lost(Conflict):
    """A guard did not hold: `key` is at revision `actual` (0: absent), not at `expected`. Nothing was written."""

    def __init__(self, key: str, expected: int, actual: int) -> None:
        super().__init__(f"{key} is at revision {actual}, not {expected}", key=key, expected=expected, actual=actual)
        self.key = key
        self.expected = expected
        self.actual = actual


class Unknown(QmpdError):
    """The outcome is not known: it may have happened, and may still happen. Read again before doing anything about it."""

    code = "outcome_unknown"


class Gap(QmpdError):
    """A watch cannot go on from where it was asked to; changes are kept from revision `first` on. Read again, then watch."""

    code = "changes_gone"

    def __init__(self, first: int) -> None:
        super().__init__(f"changes are kept from revision {first} on", first=first)
        self.first = first


class Store(Protocol):
    """Records by key. Keys are printable ASCII without blanks, up to `MAX_KEY_BYTES`."""

    @property
    def shared(self) -> bool:
        """Whether other hosts write to the same records."""

    async def read(self, prefix: str) -> Snapshot:
        """All records whose key begins with `prefix` ("" for all), none older than any commit acknowledged before the call.

        Raises:
            Unknown: the store did not answer.
        """

    async def commit(self, guards: Mapping[str, int], writes: Mapping[str, bytes | None]) -> int:
        """Write all of `writes` (None deletes) if every key of `guards` is at the given revision (0: absent); durable on return.

        Returns the revision of the commit. Where nothing had to be written it is the store's current one.

        Raises:
            Lost: a guard did not hold; nothing was written.
            NoSpace: the disk is full; nothing was written and the old records are intact.
            TooLarge: over a limit of this module; nothing was written.
            Busy: too many commits are waiting; nothing was written.
            Unknown: anything else. It may have happened.
        """

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        """Every change under `prefix` with a revision above `after`, in order, for ever; ends when the store is closed.

        Raises:
            Gap: at any step, when changes above `after` (or above the last one yielded) are no longer kept, or when
                `after` is a revision this store has never reached.
            Unknown: the store did not answer.
        """


def check_commit(guards: Mapping[str, int], writes: Mapping[str, bytes | None]) -> None:
    """Hold a commit against the limits every implementation shares.

    Raises:
        TooLarge: a key, the number of operations or the bytes together are over a limit.
        ValueError: a key no implementation takes, or a revision that cannot be.
    """
    if max(len(guards), len(writes)) > MAX_OPERATIONS:
        raise TooLarge(f"a commit takes at most {MAX_OPERATIONS} guards and as many writes", limit=MAX_OPERATIONS)
    size = 0
    for key in (*guards, *writes):
        check_key(key)
        size += len(key) + len(writes.get(key) or b"")
    if size > MAX_COMMIT_BYTES:
        raise TooLarge(f"{size} bytes in one commit, over the limit of {MAX_COMMIT_BYTES}", limit=MAX_COMMIT_BYTES)
    for key, revision in guards.items():
        if revision < 0:
            raise ValueError(f"{key} is guarded by revision {revision}")


def check_key(key: str) -> None:
    """Refuse a key no implementation takes.

    Raises:
        TooLarge: over `MAX_KEY_BYTES`.
        ValueError: empty, or not printable ASCII without blanks.
    """
    if len(key) > MAX_KEY_BYTES:
        raise TooLarge(f"a key of {len(key)} characters, over the limit of {MAX_KEY_BYTES}", limit=MAX_KEY_BYTES)
    if not _KEY.match(key):
        raise ValueError(f"{key!r} cannot be a key: printable ASCII without blanks only")
