"""Shell completion: the script for each shell, and the names that the daemon knows."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from qmpctl.exits import Exit
from qmpctl.invocation import socket_path
from qmpd_api.endpoint import default_socket

#: Somebody is waiting between two keystrokes: no names are better than late ones.
PATIENCE_S: Final = 1.0

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, synchronously: importing an asynchronous client would take longer than the question."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


def answer(route: str) -> object:
    """What the daemon answers to a GET, or None for whatever reason."""
    connection = _UnixConnection(socket_path() or default_socket())
    try:
        connection.request("GET", route, headers={"Accept": "application/json"})
        response = connection.getresponse()
        decoded: object = json.loads(response.read()) if response.status == http.client.OK else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    else:
        return decoded
    finally:
        connection.close()


def _rows(answered: object, key: str, named: str) -> Iterator[tuple[str, str]]:
    rows = answered.get(key) if isinstance(answered, dict) and key else answered
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get(named), str):
            yield row[named], str(row.get("state") or row.get("title") or "")


def _completer(route: str, key: str, named: str) -> Completer:
    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with context.scope(cleanup=False):
            found = _rows(answer(route), key, named)
        return [CompletionItem(name, help=help_text or None) for name, help_text in found if name.startswith(incomplete)]

    return complete


machine_names: Final = _completer("/v1/machines", "machines", "name")
board_ids: Final = _completer("/v1/boards", "", "id")
job_ids: Final = _completer("/v1/jobs", "jobs", "id")


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> int:
    """Print the completion script of a shell, to be sourced by it.

    \b
    bash: source <(qmpctl completion bash)
    zsh:  source <(qmpctl completion zsh)
    fish: qmpctl completion fish | source
    """
    kind = get_completion_class(shell)
    if kind is None:
        return Exit.OTHER
    click.echo(kind(context.find_root().command, {}, "qmpctl", "_QMPCTL_COMPLETE").source())
    return Exit.OK
