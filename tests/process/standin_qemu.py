"""A program that looks like a QEMU to the daemon, and does what a real one does only on a bad day."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from qmpd.daemon import running
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from tests.conftest import end_machines
from tests.unit.standin_emulator import ANSWERS

PROGRAM = """\
import json, os, signal, socket, sys

ANSWERS, HABITS = {answers!r}, {habits!r}
running, status = False, "prelaunch"


def say(stream, document):
    stream.write(json.dumps(document) + "\\n")
    stream.flush()


def event(stream, name, **data):
    say(stream, {{"event": name, "data": data, "timestamp": {{"seconds": 0, "microseconds": 0}}}})


def end(stream, ident, reason):
    event(stream, "SHUTDOWN", guest=reason.startswith("guest"), reason=reason)
    say(stream, {{"return": {{}}, "id": ident}})
    os._exit(0)


def command(stream, name, ident):
    global running, status
    if name in HABITS["refuses"]:
        say(stream, {{"error": {{"class": "GenericError", "desc": "I will not " + name}}, "id": ident}})
        return
    if name in HABITS["ignores"]:
        return
    if name in HABITS["lacks"]:
        error = {{"class": "CommandNotFound", "desc": "The command " + name + " has not been found"}}
        say(stream, {{"error": error, "id": ident}})
        return
    if name == "quit":
        end(stream, ident, "host-qmp-quit")
    if name == "x-guest-powers-off" or (name == "system_powerdown" and "powers off" in HABITS["guest"]):
        end(stream, ident, "guest-shutdown")
    if name in ("cont", "stop"):
        running, status = (True, "running") if name == "cont" else (False, "paused")
        event(stream, "RESUME" if running else "STOP")
    if name == "system_reset":
        event(stream, "RESET", guest=False, reason="host-qmp-system-reset")
    answer = {{"running": running, "status": status}} if name == "query-status" else ANSWERS.get(name, {{}})
    if name == "query-uuid":
        answer = {{"UUID": HABITS.get("uuid") or option("-uuid")[0]}}
    say(stream, {{"return": answer, "id": ident}})


def requests(descriptor):
    # Commands need no end of line, as with QEMU.
    text = ""
    while chunk := os.read(descriptor, 65536):
        text += chunk.decode()
        while text.strip():
            try:
                request, end_ = json.JSONDecoder().raw_decode(text.lstrip())
            except ValueError:
                break
            text = text.lstrip()[end_:]
            yield request


def converse(descriptor, stream):
    say(stream, {{"QMP": {{"version": {{"qemu": {{"major": 9, "minor": 8, "micro": 7}}, "package": ""}}, "capabilities": []}}}})
    for request in requests(descriptor):
        if request["execute"] == "x-hang-up":
            return
        command(stream, request["execute"], request.get("id"))


def option(name):
    return [value for word, value in zip(sys.argv, sys.argv[1:]) if word == name]


if option("-machine") == ["none"]:
    converse(0, sys.stdout)
    sys.exit()
if "dies" in HABITS["start"]:
    sys.exit("qemu-system-toy: the guest\\x1b[2J ate the firmware")
if "SIGTERM" in HABITS["ignores"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sockets = {{}}
for text in option("-chardev"):
    values = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if "fd" in values:
        sockets[values["id"]] = socket.socket(fileno=int(values["fd"]))
        sockets[values["id"]].listen(1)  # the kernel notes who did: the peer of those who connect
    elif text.startswith("pipe"):
        with open(values["path"] + ".out", "a") as log:
            log.write("toy booted\\n")
while True:
    connection, _ = sockets["qmp"].accept()
    if "hangs up" in HABITS["start"]:
        connection.close()
        signal.pause()
    if "mute" in HABITS["start"]:
        signal.pause()
    try:
        with connection, connection.makefile("w") as stream:
            converse(connection.fileno(), stream)
    except (BrokenPipeError, ConnectionResetError):
        pass
"""

BOARD = """\
title = "Toy"
arch = "toy"
emulators = ["toy"]
machine = "board"
max_cpus = 4
[memory]
default_mib = 16
[console]
kernel = "ttyT0"
"""


def make(directory: Path, habits: dict[str, Sequence[str]]) -> Path:
    """The program in `directory`. Habits: what it `refuses`, `ignores` and `lacks`, how its `start` goes wrong, what its `guest` does."""
    known: dict[str, Sequence[str]] = {"refuses": (), "ignores": (), "lacks": (), "start": (), "guest": (), **habits}
    path = directory / "qemu-system-toy"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -SE\n" + PROGRAM.format(answers={**ANSWERS, "query-cpu-definitions": []}, habits=known))
    path.chmod(0o755)
    return path


def toy_settings(settings: Settings, directory: Path, **habits: Sequence[str]) -> Settings:
    """Settings of a daemon that has the stand-in and a board for it."""
    boards = directory / "boards"
    boards.mkdir(exist_ok=True)
    (boards / "toy.toml").write_text(BOARD)
    program = make(directory / "bin", habits)
    return msgspec.structs.replace(
        settings, boards=(str(boards),), emulators=(str(program),), cache_dir=str(directory / "cache"), qmp_users=("admin",)
    )


@asynccontextmanager
async def toys(settings: Settings, directory: Path, **habits: Sequence[str]) -> AsyncIterator[Service]:
    """A daemon whose machines have these habits; they are killed at the end."""
    async with running(toy_settings(settings, directory, **habits), {}) as service:
        try:
            yield service
        finally:
            await end_machines(service)


def toy(name: str = "one", **changes: object) -> MachineSpec:
    """A machine for it."""
    return msgspec.structs.replace(MachineSpec(name=name, board="toy"), **changes)
