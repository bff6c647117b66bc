"""The command `qmpd pki`: certificates issued, renewed, revoked and checked on the host that has the files. Needs no daemon."""

from __future__ import annotations

import argparse
import ipaddress
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

import msgspec

from qmpd import checkreport
from qmpd.errors import QmpdError
from qmpd.pki import ISSUED, own_hosts
from qmpd.pki.asking import ask
from qmpd.pki.certificates import Unreadable, describe
from qmpd.pki.checking import check, daemon_of
from qmpd.pki.directory import AUTHORITY, REVOKED, Issued, Pki
from qmpd.pki.invitations import invite
from qmpd.pki.joining import join
from qmpd.settings import Settings
from qmpd.views import CheckReport

#: A token from standard input has less.
LONGEST_TOKEN: Final = 1024
#: How long a revocation takes from one daemon to the next (`qmpd.authority`).
PERIOD: Final = "a minute"
#: The conclusions of `qmpd pki check`.
GOOD: Final = "Daemons can trust each other with these files."
BAD: Final = "Daemons cannot trust each other until the failures are mended."


def run(arguments: argparse.Namespace, settings: Settings, *, output: TextIO | None = None) -> int:
    """Carries out one step; 0 when it worked, 1 when it did not or a check failed."""
    output = sys.stdout if output is None else output
    pki = Pki(settings.pki_dir)
    try:
        if arguments.step == "check":
            return _check(arguments, pki, output, settings)
        return _STEPS[arguments.step](arguments, pki, output)
    except (QmpdError, Unreadable) as error:
        sys.stderr.write(f"qmpd: {error}\n")
        return 1


def _init(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    hosts = (*arguments.host, *own_hosts())
    name = next((host for host in hosts if not _is_address(host)), hosts[0])
    pki.init(arguments.name)
    pki.install(pki.issue(name, "peer", hosts), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    output.write(f"authority {arguments.name!r} and a certificate for {name} are in {pki.directory}\n")
    return 0


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _issue(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    target = _target(arguments, pki)
    if arguments.step == "renew":
        made = pki.renew(arguments.name, days=arguments.days)
    else:
        made = pki.issue(arguments.name, arguments.role, arguments.host, days=arguments.days)
    facts = describe(made.certificate)
    pki.store(target, made)
    output.write(f"{facts.role} {facts.name}, valid until {facts.not_after:%Y-%m-%d}: {target}\n")
    return 0


def _invite(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    token = invite(pki, arguments.name, arguments.role, arguments.host, minutes=arguments.ttl, days=arguments.days)
    output.write(f"{token}\n")
    return 0


def _join(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    shown: str = arguments.token
    facts = join(pki, arguments.url, sys.stdin.readline(LONGEST_TOKEN) if shown == "-" else shown)
    output.write(f"{facts.role} {facts.name}, valid until {facts.not_after:%Y-%m-%d}: {pki.directory}\n")
    return 0


def _revoke(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    output.writelines(f"revoked {line.name} ({line.serial})\n" for line in pki.revoke(arguments.name))
    output.write(f"peers of this host's daemon take notice within {PERIOD}; to everybody else copy {pki.directory / REVOKED}\n")
    return 0


def _listed(arguments: argparse.Namespace, pki: Pki, output: TextIO) -> int:
    book = pki.issued()
    if arguments.json:
        output.write(msgspec.json.encode(book).decode() + "\n")
        return 0
    rows = [("NAME", "ROLE", "STATE", "UNTIL", "SERIAL"), *(_row(line) for line in book)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    output.writelines("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)
    return 0


def _row(line: Issued) -> tuple[str, ...]:
    state = "revoked" if line.revoked_at else "expired" if line.not_after <= datetime.now(UTC) else "valid"
    return line.name, line.role, state, f"{line.not_after:%Y-%m-%d}", line.serial


def _check(arguments: argparse.Namespace, pki: Pki, output: TextIO, settings: Settings) -> int:
    now = datetime.now(UTC)
    lines = tuple(check(pki.directory, daemon_of(settings, arguments.host or own_hosts()), now))
    if not arguments.offline:
        lines += tuple(ask(pki, settings.peers, now))
    report = CheckReport(ok=all(line.verdict != "fail" for line in lines), lines=lines)
    if arguments.json:
        output.write(msgspec.json.encode(report).decode() + "\n")
    else:
        width = shutil.get_terminal_size().columns
        output.write(checkreport.text(report, width=width, colour=checkreport.coloured(output), conclusion=GOOD if report.ok else BAD))
    return 0 if report.ok else 1


def _target(arguments: argparse.Namespace, pki: Pki) -> Path:
    target: Path = arguments.out or pki.directory / ISSUED / arguments.name
    return target.absolute()


_STEPS: Final[dict[str, Callable[[argparse.Namespace, Pki, TextIO], int]]] = {
    "init": _init,
    "issue": _issue,
    "renew": _issue,
    "join-token": _invite,
    "join": _join,
    "revoke": _revoke,
    "list": _listed,
}
