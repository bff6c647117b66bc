"""One run of qmpctl: its global options, and its conversation with the daemon."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeVar

import click

from qmpctl.exits import Exit, Terminated, report
from qmpd.errors import QmpdError
from qmpd_api.endpoint import default_pki

if TYPE_CHECKING:
    from qmpd_api.client import Client
    from qmpd_api.connection import Remote

T = TypeVar("T")

#: As many machines are started or stopped at once; more would only compete for the same processors.
AT_ONCE: Final = 8
_ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
_JSON: Final = "qmpctl.json"
_SOCKET: Final = "qmpctl.socket"
_URL: Final = "qmpctl.url"
_PKI: Final = "qmpctl.pki_dir"
#: The text of a token, for a daemon on another host. Not an option: a command line is for everybody to see.
TOKEN_VARIABLE: Final = "QMPD_TOKEN"  # noqa: S105  its name, not a token
URL_VARIABLE: Final = "QMPD_URL"
SCHEME: Final = "https://"


def _remember(key: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def remember(context: click.Context, _parameter: click.Parameter, value: object) -> None:
        if value:
            context.meta[key] = value

    return remember


#: Options that every command takes, before or after its name.
GLOBAL_OPTIONS: Final = (
    click.Option(["--json"], is_flag=True, expose_value=False, callback=_remember(_JSON), help="Print JSON."),
    click.Option(
        ["--socket"],
        metavar="PATH",
        expose_value=False,
        callback=_remember(_SOCKET),
        help="The daemon's socket (default: QMPD_SOCKET, else root's or your own daemon's).",
    ),
    click.Option(
        ["--url"],
        metavar="https://HOST:PORT",
        expose_value=False,
        callback=_remember(_URL),
        help="A daemon on another host instead (default: QMPD_URL). QMPD_TOKEN may hold a token for it.",
    ),
    click.Option(
        ["--pki-dir"],
        metavar="DIR",
        expose_value=False,
        callback=_remember(_PKI),
        help="The directory of certificates for --url (default: that of your own or the host's daemon).",
    ),
)


class Verb(click.Command):
    """A command with the global options."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the global options."""
        own = super().get_params(ctx)
        return [*own[:-1], *GLOBAL_OPTIONS, *own[-1:]]


def as_json() -> bool:
    """Whether the answer is wanted as JSON."""
    return bool(click.get_current_context().meta.get(_JSON))


def socket_path() -> str | None:
    """The socket that was named, if any."""
    named: object = click.get_current_context().meta.get(_SOCKET)
    return named if isinstance(named, str) else None


def target() -> str | Remote | None:
    """Which daemon was named: a socket, one on another host, or none. Raises UsageError."""
    meta = click.get_current_context().meta
    path, address = socket_path(), meta.get(_URL) or (os.environ.get(URL_VARIABLE) if socket_path() is None else None)
    if address is None:
        return path
    if path is not None:
        raise click.UsageError("--socket and --url name two daemons")
    if not isinstance(address, str) or not address.startswith(SCHEME) or ":" not in address.removeprefix(SCHEME):
        raise click.UsageError(f"--url must be like {SCHEME}host:8443, not {address}")
    from qmpd_api.connection import Remote

    pki = meta.get(_PKI)
    directory = pki if isinstance(pki, str) else default_pki()
    return Remote(address=address.removeprefix(SCHEME).rstrip("/"), pki_dir=directory, token=os.environ.get(TOKEN_VARIABLE) or None)


def perform(work: Callable[[Client], Awaitable[T]]) -> T:
    """What `work` returns, given a client. SIGTERM and SIGHUP cancel it, so that all it holds is put back, and raise Terminated."""
    return asyncio.run(_perform(work, target()))


async def _perform(work: Callable[[Client], Awaitable[T]], daemon: str | Remote | None) -> T:
    from qmpd_api.client import Client

    received: list[int] = []
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        received.append(number)
        if task is not None:
            task.cancel()

    for number in _ENDING_SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        async with Client(daemon) as client:
            return await work(client)
    except asyncio.CancelledError:
        if received:
            raise Terminated(received[0]) from None
        raise


def for_each(names: Iterable[str], work: Callable[[Client, str], Awaitable[T]], done: Callable[[str, T], None]) -> int:
    """Do `work` for every name, several at once; `done` sees each answer, stderr each error. The exit code is the first error's."""

    async def all_of_them(client: Client) -> int:
        turns = asyncio.Semaphore(AT_ONCE)
        exits: list[Exit] = []

        async def one(name: str) -> None:
            async with turns:
                try:
                    done(name, await work(client, name))
                except QmpdError as error:
                    exits.append(report(error, name))

        async with asyncio.TaskGroup() as group:
            for name in dict.fromkeys(names):
                group.create_task(one(name), name=f"qmpctl {name}")
        return exits[0] if exits else Exit.OK

    return perform(all_of_them)
