"""The database of one host: operations in, durable transactions out.

Theory: all SQL runs on one thread. What is asked for while a transaction is under way waits and goes into the next one together
(group commit): under load, many callers share one sync of the disk. Inside the transaction every request has a savepoint, sees
what the requests before it wrote, and fails for itself alone. When the disk refuses the transaction, each request gets one of
its own, so that a small write survives beside one that does not fit. Requests may thus run more than once: they depend on the
database alone and change nothing else.

How an error of SQLite is read: no space, and the transaction was undone, is `NoSpace`. Anything else is `Unknown`. After a
COMMIT that failed in any other way the file is closed and opened again, so that the next read finds what a restart would find.

Known imperfection: a quota that is used up is an I/O error to SQLite, so it is `Unknown` here, not `NoSpace`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

from qmpd.errors import Busy, NoSpace, QmpdError
from qmpd.failpoint import failpoint
from qmpd.statefile import connect, is_full, owned, prepare
from qmpd.store import Unknown

#: A sync takes milliseconds, seconds on a disk in trouble; whoever waited this long is better told that nothing is known.
ANSWER_LIMIT_S: Final = 30.0
#: At shutdown what is queued still gets this long; a disk that is stuck must not keep the daemon from ending.
CLOSE_LIMIT_S: Final = 30.0
#: Requests in one transaction: bounds how long the first waits for the last.
MAX_BATCH: Final = 256
#: Requests waiting; beyond it they are refused, so that a stuck disk does not fill the memory.
MAX_WAITING: Final = 10_000

_log = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Request(Generic[T_co]):
    """One operation on its way to the thread and back."""

    def __init__(self, operation: Callable[[sqlite3.Connection], T_co], future: asyncio.Future[T_co]) -> None:
        self._operation = operation
        self._future = future
        self._deliver: Callable[[], None] | None = None
        self.error: Exception | None = None

    def attempt(self, connection: sqlite3.Connection) -> None:
        """Run the operation. An error of SQLite itself is raised: it concerns the whole transaction."""
        self.error = None
        try:
            result = self._operation(connection)
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001  thread boundary: whatever it is, it is for the caller on the loop's side
            self.error = error
        else:
            self._deliver = partial(self._future.set_result, result)

    def settle(self) -> None:
        """Hand the outcome to the caller, on the loop's side."""
        if self.error is not None:
            self._future.set_exception(self.error)
        elif self._deliver is not None:
            self._deliver()
        else:
            self._future.set_exception(Unknown("the database failed before it came to this request"))


class _InDoubt(Exception):
    """COMMIT failed in a way that does not say whether it happened."""


class _File:
    """The connection and its transactions, as the database's thread sees them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def open(self) -> sqlite3.Connection:
        """The connection, opened (again) where it has to be."""
        if self._connection is None:
            self._connection = connect(self._path)
        return self._connection

    def close(self) -> None:
        """Give the connection up; `open` makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def write(self, requests: Sequence[_Request[object]]) -> None:
        """Commit all requests together; where that is refused, each one alone."""
        try:
            self._transact(requests)
        except _InDoubt as doubt:
            self.close()
            _log.error("commit of %d requests failed, outcome unknown: %s", len(requests), doubt.__cause__)
            for request in requests:
                request.error = Unknown(f"the commit failed, it may have happened: {doubt.__cause__}")
        except sqlite3.Error as error:
            self._undo()
            if len(requests) == 1 or self._connection is None:
                for request in requests:
                    request.error = _meaning(error)
            else:
                for request in requests:
                    self.write([request])

    def read(self, request: _Request[object]) -> None:
        """Answer a request that writes nothing."""
        try:
            request.attempt(self.open())
        except sqlite3.Error as error:
            request.error = _meaning(error)

    def _transact(self, requests: Sequence[_Request[object]]) -> None:
        connection = self.open()
        connection.execute("BEGIN IMMEDIATE")
        for request in requests:
            connection.execute("SAVEPOINT request")
            request.attempt(connection)
            if request.error is not None:
                connection.execute("ROLLBACK TO request")
            connection.execute("RELEASE request")
        try:
            failpoint("database-commit")
            connection.execute("COMMIT")
            failpoint("database-committed")
        except sqlite3.Error as error:
            if is_full(error):
                raise
            raise _InDoubt from error

    def _undo(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                self.close()


class Database:
    """The open database: takes operations on its connection from the event loop, runs them on its thread.

    An operation may run more than once and must depend on nothing but the database. What one writes and then raises is undone.
    """

    def __init__(self, file: _File, thread: ThreadPoolExecutor, answer_limit_s: float) -> None:
        self._file = file
        self._thread = thread
        self._answer_limit_s = answer_limit_s
        self._loop = asyncio.get_running_loop()
        self._writes: deque[_Request[object]] = deque()
        self._reads: deque[_Request[object]] = deque()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._lingering: asyncio.TimerHandle | None = None

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """What the operation finds, after every write that was acknowledged before.

        Raises whatever it raises, `Busy` when too much is waiting and `Unknown` when the database does not answer.
        """
        return await self.answer(self._enqueue(self._reads, operation))

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run the operation in a transaction; on return it is durable. Cancelled or not, it will be run.

        Raises whatever it raises, `NoSpace` and `Busy` when nothing was changed, and `Unknown`.
        """
        return await self.answer(self.enqueue(operation))

    def enqueue(self, operation: Callable[[sqlite3.Connection], T], *, linger_s: float = 0.0) -> asyncio.Future[T]:
        """Like `write` without waiting. Requests are run, and their futures settled, in the order of the calls.

        One that nobody waits for may linger so long for others that it can share a transaction with; the next that does not, a read
        too, takes it along.
        """
        return self._enqueue(self._writes, operation, linger_s)

    async def answer(self, future: asyncio.Future[T]) -> T:
        """Wait for an enqueued request as long as a caller should.

        Raises:
            Unknown: no answer within the limit; the request is still under way.
        """
        try:
            async with asyncio.timeout(self._answer_limit_s):
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise Unknown(f"the database did not answer within {self._answer_limit_s:g} s") from error

    def _enqueue(
        self, queue: deque[_Request[object]], operation: Callable[[sqlite3.Connection], T], linger_s: float = 0.0
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(Busy("the database is closed"))
        elif len(queue) >= MAX_WAITING:
            future.set_exception(Busy(f"{MAX_WAITING} requests are waiting for the database"))
        else:
            request: _Request[T] = _Request(operation, future)
            queue.append(request)
            self._wake(linger_s)
        return future

    def _wake(self, linger_s: float) -> None:
        """See that the thread gets what waits, within `linger_s` if it has nothing to do."""
        lingering = self._lingering
        if not self._idle.is_set() and (lingering is None or linger_s):
            return  # it is on its way, or the next batch is
        self._idle.clear()
        if lingering is not None:
            lingering.cancel()
            self._lingering = None
        if linger_s:
            self._lingering = self._loop.call_later(linger_s, self._dispatch)
        else:
            # Not at once: what is asked for in the same turn of the loop shares the transaction.
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Send the next batch to the thread; writes first, so that reads see them."""
        self._lingering = None
        writes = [self._writes.popleft() for _ in range(min(MAX_BATCH, len(self._writes)))]
        reads = [self._reads.popleft() for _ in range(min(MAX_BATCH, len(self._reads)))]
        if writes or reads:
            self._thread.submit(self._run, writes, reads)
        else:
            self._idle.set()

    def _run(self, writes: Sequence[_Request[object]], reads: Sequence[_Request[object]]) -> None:
        try:
            if writes:
                self._file.write(writes)
            for request in reads:
                self._file.read(request)
        finally:
            self._loop.call_soon_threadsafe(self._settle, (*writes, *reads))

    def _settle(self, requests: Sequence[_Request[object]]) -> None:
        # The thread gets its next batch before the callers of this one run.
        self._dispatch()
        for request in requests:
            request.settle()

    async def _drain(self) -> None:
        """Take no more requests and wait for those that are queued."""
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self._idle.wait()
        except TimeoutError:
            _log.error("the database did not finish what was queued within %g s", CLOSE_LIMIT_S)


@asynccontextmanager
async def open_database(state_dir: Path, *, answer_limit_s: float = ANSWER_LIMIT_S) -> AsyncIterator[Database]:
    """Own the state directory and open the database in it, created or migrated as needed; closes it cleanly.

    Raises:
        Held: another daemon owns the state directory; the message names its pid.
        DatabaseRefused: directory or database cannot be used as they are; nothing was changed, and the message says what to do.
        NoSpace: there is no space to create or migrate it.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qmpd-database")
    opened = ExitStack()
    try:
        file = await loop.run_in_executor(thread, _open, opened, state_dir)
        database = Database(file, thread, answer_limit_s)
        try:
            yield database
        finally:
            await database._drain()  # noqa: SLF001  the other half of this function
    finally:
        # On the same thread, so behind whatever is still under way there, an opening that was cancelled included.
        closed = loop.run_in_executor(thread, opened.close)
        thread.shutdown(wait=False)
        await asyncio.wait([closed], timeout=CLOSE_LIMIT_S)


def _open(opened: ExitStack, state_dir: Path) -> _File:
    path = opened.enter_context(owned(state_dir))
    prepare(path)
    file = _File(path)
    opened.callback(file.close)
    file.open()
    return file


def _meaning(error: sqlite3.Error) -> QmpdError:
    if is_full(error):
        return NoSpace("the disk with the state directory is full; nothing was changed")
    _log.error("the database failed: %s", error)
    return Unknown(f"the database failed: {error}")
