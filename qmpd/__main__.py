"""The `qmpd` command: the composition root.

`qmpd serve` runs the daemon, `qmpd check` looks at the host, `qmpd pki` handles certificates. Everything else is `qmpctl`, over the API.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pwd
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from qmpd import __version__, pkiarguments
from qmpd.daemon import running
from qmpd.errors import Invalid, QmpdError
from qmpd.failpoint import VARIABLE, arm
from qmpd.heap import share_one_heap
from qmpd.logs import configure
from qmpd.migration.ports import passed_ports
from qmpd.notify import announced, taken_from
from qmpd.settings import Settings, SettingsFile, check, config_path, merged, system_defaults, user_defaults

if TYPE_CHECKING:
    from qmpd.peers import Dial, PeerDaemon, Peers
    from qmpd.service import Service
    from qmpd.settings import Peer
    from qmpd.trust import Trust

#: sysexits.h: the configuration is wrong, as opposed to the daemon having failed.
EX_CONFIG: Final = 78
#: The settings that the command line has too, with what they are.
PLACES: Final = {
    "socket": "where the API listens (default: qmpd.sock in the run directory)",
    "state_dir": "definitions, disks and logs",
    "run_dir": "sockets and launch records",
    "cache_dir": "what emulators said of themselves",
    "pki_dir": "certificates",
}

_log = logging.getLogger("qmpd")
Offered = Callable[["Service", Settings, "Trust | None"], AbstractAsyncContextManager[None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        settings = _settings(arguments)
        arm(os.environ.get(VARIABLE, ""))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"qmpd: {error}\n")
        return EX_CONFIG
    if arguments.command == "check":
        from qmpd import checkcommand  # only then: every import delays a daemon that starts

        return checkcommand.run(arguments.json, settings)
    if arguments.command == "pki":
        from qmpd import pkicommand

        return pkicommand.run(arguments, settings)
    configure(settings.log_format, verbose=arguments.verbose)
    share_one_heap()
    try:
        asyncio.run(_serve(settings))
    except QmpdError as error:
        sys.stderr.write(f"qmpd: {error.message}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qmpd", description="An emulator daemon without libvirt. qmpctl is its command line.")
    parser.add_argument("--version", action="version", version=f"qmpd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_command = commands.add_parser("serve", help="run the daemon in the foreground")
    check_command = commands.add_parser("check", help="what this host can do, and how to mend what it cannot")
    for command in (serve_command, check_command, pkiarguments.add_parser(commands)):
        command.add_argument("--config", type=Path, help="the configuration file (default: /etc/qmpd/qmpd.toml, or the user's own)")
        command.add_argument("--system", action="store_true", help="the host's daemon, whoever runs it (default for root)")
    for command in (serve_command, check_command):
        for name, purpose in PLACES.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=Path, help=purpose)
    serve_command.add_argument("--verbose", action="store_true", help="log what happens, not only what matters")
    check_command.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    uid, user, home = _user()
    system = arguments.system or uid == 0
    defaults = system_defaults() if system else user_defaults(user, home, os.environ)
    path = arguments.config or Path(config_path(home, os.environ, system=system))
    read = SettingsFile()
    if arguments.config is not None or path.exists():
        try:
            read = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), SettingsFile)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{path}: {error}") from error
    given = {name: str(Path(value).absolute()) for name in PLACES if (value := getattr(arguments, name, None))}
    settings = merged(defaults, msgspec.structs.replace(read, **given))
    try:
        check(settings)
    except Invalid as error:
        raise ValueError(f"{path}: {error.message}") from error
    return settings


def _user() -> tuple[int, str, str]:
    """Who runs the daemon: uid, name and home. In a container a uid often has no entry in passwd."""
    uid = os.getuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return uid, str(uid), os.environ.get("HOME") or "/"
    return uid, entry.pw_name, entry.pw_dir


def _trust(directory: str, peers: Peers) -> Trust:
    from qmpd.trust import loaded  # a daemon without `listen` needs no cryptography

    return loaded(directory, peers)


def _dial(settings: Settings) -> Dial:
    def dial(peer: Peer) -> AbstractAsyncContextManager[PeerDaemon]:
        from qmpd_api.dialling import dialled  # by then the API has been imported, aside

        return dialled(peer, settings.pki_dir)

    return dial


def _offered() -> Offered:
    """The API, which takes half of the time that a daemon needs until it answers: it is imported while the machines are found."""
    with _no_authorities():
        from qmpd_api.offering import offered

    return offered


@contextmanager
def _no_authorities() -> Iterator[None]:
    """Keeps aiohttp from reading all of the host's certificate authorities when it is imported: none of them is ever asked here."""
    kept = {name: os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    os.environ.update(dict.fromkeys(kept, os.devnull))
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    importing = loop.create_task(asyncio.to_thread(_offered), name="import-api")
    ended = asyncio.Event()
    manager = taken_from(os.environ, os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with AsyncExitStack() as stack:
        awaiting = passed_ports(os.environ, os.getpid())
        service = await stack.enter_async_context(running(settings, os.environ, _dial(settings), awaiting))
        trust = await asyncio.to_thread(_trust, settings.pki_dir, service.peering.peers) if settings.listen else None
        offered = await importing
        await stack.enter_async_context(offered(service, settings, trust))
        await stack.enter_async_context(announced(manager, f"ready, with {service.version().machines_running} machines running"))
        _log.info("ready", extra={"socket": settings.socket, "version": __version__})
        await ended.wait()
        _log.info("ending; machines go on")


if __name__ == "__main__":
    sys.exit(main())
