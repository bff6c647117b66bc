"""The `qmpd` command: the composition root.

`qmpd serve` runs the daemon, `qmpd check` looks at the host. Everything else is `qmpctl`, over the API.
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
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from qmpd import __version__
from qmpd.checkcommand import run as run_check
from qmpd.daemon import running
from qmpd.errors import QmpdError
from qmpd.logs import configure
from qmpd.notify import announced, taken_from
from qmpd.settings import Settings, SettingsFile, config_path, merged, system_defaults, user_defaults
from qmpd_api.application import create
from qmpd_api.server import answering, passed_sockets, serve

#: sysexits.h: the configuration is wrong, as opposed to the daemon having failed.
EX_CONFIG: Final = 78

_log = logging.getLogger("qmpd")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        settings = _settings(arguments)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"qmpd: {error}\n")
        return EX_CONFIG
    if arguments.command == "check":
        return run_check(arguments.json, settings)
    configure(verbose=arguments.verbose)
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
    for command in (serve_command, check_command):
        command.add_argument("--config", type=Path, help="the configuration file (default: /etc/qmpd/qmpd.toml, or the user's own)")
        command.add_argument("--socket", type=Path, help="where the API listens")
        command.add_argument("--state-dir", type=Path, help="definitions, disks and logs")
        command.add_argument("--run-dir", type=Path, help="sockets and launch records")
        command.add_argument("--cache-dir", type=Path, help="what emulators said of themselves")
    serve_command.add_argument("--verbose", action="store_true", help="log what happens, not only what matters")
    check_command.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    uid, user, home = _user()
    defaults = system_defaults() if uid == 0 else user_defaults(user, home, os.environ)
    path = arguments.config or Path(config_path(uid, home, os.environ))
    read = SettingsFile()
    if arguments.config is not None or path.exists():
        try:
            read = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), SettingsFile)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{path}: {error}") from error
    given = {
        name: str(Path(value).absolute()) for name in ("socket", "state_dir", "run_dir", "cache_dir") if (value := getattr(arguments, name))
    }
    return msgspec.structs.replace(merged(defaults, read), **given)


def _user() -> tuple[int, str, str]:
    """Who runs the daemon: uid, name and home. In a container a uid often has no entry in passwd."""
    uid = os.getuid()
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return uid, str(uid), os.environ.get("HOME") or "/"
    return uid, entry.pw_name, entry.pw_dir


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    manager = taken_from(os.environ, os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running(settings, os.environ))
        app = create(service)
        passed = passed_sockets(os.environ, os.getpid())
        listening = answering(app, passed) if passed else serve(app, settings.socket, group=settings.socket_group)
        await stack.enter_async_context(listening)
        await stack.enter_async_context(announced(manager, f"ready, with {service.version().machines_running} machines running"))
        _log.info("ready", extra={"socket": settings.socket, "version": __version__})
        await ended.wait()
        _log.info("ending; machines go on")


if __name__ == "__main__":
    sys.exit(main())
