"""The arguments of `qmpd pki`, apart from what carries them out: a daemon that starts need not wait for a library of cryptography."""

from __future__ import annotations

import argparse
from pathlib import Path

from qmpd.access import ROLES
from qmpd.pki import CERTIFICATE_DAYS, INVITED_MINUTES, ISSUED


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `pki` and its commands."""
    parser = commands.add_parser("pki", help="certificates for the API over TCP and for migration")
    parser.add_argument("--dir", dest="pki_dir", type=Path, help="where they are (default: the setting pki_dir)")
    steps = parser.add_subparsers(dest="step", required=True)
    init = steps.add_parser("init", help="make an authority here, and a certificate for this host")
    init.add_argument("--name", default="qmpd", help="the authority's name (default: qmpd)")
    init.add_argument("--host", action="append", default=[], help="a name or address of this host; may be repeated (default: its own name)")
    _add_joining(steps)
    issue = steps.add_parser("issue", help="issue a certificate to a host or a person")
    issue.add_argument("name", help="who it is for; of a host, its name")
    issue.add_argument("--role", choices=ROLES, default="peer", help="what its owner may do (default: peer, another daemon)")
    issue.add_argument("--host", action="append", default=[], help="another name or address of a host; may be repeated")
    for command in (issue, steps.add_parser("renew", help="issue the newest certificate of a name again, with a new key")):
        if command is not issue:
            command.add_argument("name")
        command.add_argument("--days", type=int, default=CERTIFICATE_DAYS, help=f"how long it is valid (default: {CERTIFICATE_DAYS})")
        command.add_argument("--out", type=Path, help=f"the directory for its files (default: {ISSUED}/NAME in the authority's directory)")
    revoke = steps.add_parser("revoke", help="revoke the certificates of a name, or one by its serial number")
    revoke.add_argument("name")
    steps.add_parser("list", help="the certificates that were issued here")
    checking = steps.add_parser("check", help="whether the files of this host will do, and how to mend what will not")
    checking.add_argument("--host", action="append", default=[], help="a name or address under which peers reach this host")
    checking.add_argument("--offline", action="store_true", help="do not ask the peers in the settings")
    for command in (checking, steps.choices["list"]):
        command.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


def _add_joining(steps: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inviting = steps.add_parser("join-token", help="invite a host or a person: print a token that is good for one certificate")
    inviting.add_argument("name", help="who it is for; of a host, its name")
    inviting.add_argument("--role", choices=ROLES, default="peer", help="what its owner may do (default: peer, another daemon)")
    inviting.add_argument("--host", action="append", default=[], help="another name or address of a host; may be repeated")
    inviting.add_argument("--ttl", type=float, default=INVITED_MINUTES, metavar="MINUTES", help="how long it can be used (default: 60)")
    inviting.add_argument(
        "--days", type=int, default=CERTIFICATE_DAYS, help=f"how long the certificate is valid (default: {CERTIFICATE_DAYS})"
    )
    joining = steps.add_parser("join", help="get a certificate from the daemon on the authority's host, for a key that is made here")
    joining.add_argument("url", help="where that daemon is, like https://lab1.example:8443")
    joining.add_argument("--token", required=True, help="what qmpd pki join-token printed there, or - to read it from standard input")
