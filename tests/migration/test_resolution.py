"""What a person may decide about a machine that was given away: the other host is believed, where it answers."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from qmpd.errors import WrongState
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest, ResolveRequest
from tests.api.lab import LOOPBACK, authority, daemon, host, peer, port
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME, cuts_off, given, keeps_silent, until, view, withholds
from tests.migration.test_moves import HUNG_S, LOOK_S, counting, ended, known, printed

__all__ = ["counting"]
pytestmark = pytest.mark.qemu

KEEP = ResolveRequest(action="keep", confirm=NAME)
MOVED = ResolveRequest(action="moved", confirm=NAME)


async def test_a_machine_is_forgotten_that_its_silent_owner_has(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with given(short_directory, counting, monkeypatch) as (a, b, job):
        with pytest.MonkeyPatch.context() as apart:
            cuts_off(a, apart)
            resolved = await a.service.migration.resolve(NAME, MOVED)
        assert (resolved.phase, resolved.owner) == ("moved", "destination")
        assert known(a, NAME) is None
        assert not (short_directory / "a/s/machines" / NAME).exists()
        assert "decided" in str((await ended(a, job)).error)
        monkeypatch.undo()
        await until(b, "arrived")  # it asks, and hears that the machine was given
        await printed(b, NAME, 100)
        await b.service.kill(NAME)


async def test_who_answers_that_it_has_not_got_the_machine_is_believed(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with given(short_directory, counting, monkeypatch) as (a, b, job):
        with pytest.raises(WrongState, match="b answers, and has not taken the machine: there it is loaded"):
            await a.service.migration.resolve(NAME, MOVED)
        assert a.service.machine(NAME).operation == "migrate"
        monkeypatch.undo()
        assert (await ended(a, job)).state == "succeeded"
        with pytest.raises(WrongState):
            await b.service.migration.resolve(NAME, MOVED)
        await b.service.kill(NAME)


async def test_nothing_is_kept_that_the_other_host_has(short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async with given(short_directory, counting, monkeypatch, withholding=keeps_silent) as (a, b, job):
        await until(b, "arrived")  # it asked, and heard that the machine was given
        with pytest.raises(WrongState, match="b has taken the machine"):
            await a.service.migration.resolve(NAME, KEEP)
        assert a.service.machine(NAME).operation == "migrate"
        monkeypatch.undo()
        assert (await ended(a, job)).state == "succeeded"
        await b.service.kill(NAME)


async def test_a_machine_is_kept_of_which_the_other_host_says_that_it_discards_it(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with given(short_directory, counting, monkeypatch) as (a, b, job):
        resolved = await a.service.migration.resolve(NAME, KEEP)
        assert resolved.phase == "kept"
        assert view(b).phase == "discarded"
        assert (await ended(a, job)).state == "failed"
        assert known(b, NAME) is None
        await printed(a, NAME, 100)
        assert a.service.machine(NAME).state is State.RUNNING


async def test_a_host_that_was_made_anew_is_asked_whether_it_has_the_machine(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = authority(short_directory / "ca")
    a_pki, b_pki = (host(root, short_directory / name / "pki", name) for name in ("a", "b"))
    place = short_directory / "b"
    async with AsyncExitStack() as stack:
        a_port = stack.enter_context(port())
        b_listener = socket.create_server((LOOPBACK, 0))
        number = int(b_listener.getsockname()[1])
        a = await stack.enter_async_context(daemon("a", short_directory / "a", a_pki, a_port[0], [peer("b", number)]))
        stack.push_async_callback(end_machines, a.service)
        async with daemon("b", place, b_pki, b_listener, [peer("a", a_port[1])]) as before:
            await a.service.create(spec_of(counting, NAME), start=True)
            withholds(before, monkeypatch)
            job = await a.service.migration.migrate(NAME, MigrateRequest(peer="b"))
            async with asyncio.timeout(HUNG_S):
                while (found := known(before, NAME)) is None or not view(a).doubt:
                    await asyncio.sleep(LOOK_S)
            assert found.pid is not None
        os.kill(found.pid, signal.SIGKILL)
        shutil.rmtree(place / "s")
        shutil.rmtree(place / "r")
        b_listener.close()
        again = stack.enter_context(socket.create_server((LOOPBACK, number)))
        b = await stack.enter_async_context(daemon("b", place, b_pki, again, [peer("a", a_port[1])]))
        with pytest.raises(WrongState, match="no machine of this name or UUID"):
            await a.service.migration.resolve(NAME, MOVED)
        assert a.service.machine(NAME).operation == "migrate"
        await b.service.create(spec_of(counting, NAME))
        assert (await a.service.migration.resolve(NAME, MOVED)).phase == "moved"
        assert known(a, NAME) is None
        assert (await ended(a, job)).state == "failed"


async def test_a_machine_whose_owner_is_no_peer_any_more_is_forgotten(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = authority(short_directory / "ca")
    a_pki, b_pki = (host(root, short_directory / name / "pki", name) for name in ("a", "b"))
    async with AsyncExitStack() as stack:
        b_listener, number = stack.enter_context(port())
        with port() as (listener, _):
            async with daemon("a", short_directory / "a", a_pki, listener, [peer("b", number)]) as before:
                b = await stack.enter_async_context(daemon("b", short_directory / "b", b_pki, b_listener, [peer("a", before.port)]))
                stack.push_async_callback(end_machines, b.service)
                await before.service.create(spec_of(counting, NAME), start=True)
                withholds(b, monkeypatch)
                await before.service.migration.migrate(NAME, MigrateRequest(peer="b"))
                async with asyncio.timeout(HUNG_S):
                    while known(before, NAME) is None or not before.service.migration.list(NAME).migrations or not view(before).doubt:
                        await asyncio.sleep(LOOK_S)
        listener, _ = stack.enter_context(port())
        a = await stack.enter_async_context(daemon("a", short_directory / "a", a_pki, listener, []))
        async with asyncio.timeout(HUNG_S):
            while "no peer" not in (view(a).doubt or ""):
                await asyncio.sleep(LOOK_S)
        assert (await a.service.migration.resolve(NAME, MOVED)).phase == "moved"
        assert known(a, NAME) is None
        async with asyncio.timeout(HUNG_S):
            while any(task.get_name() == f"departure:{NAME}" for task in asyncio.all_tasks()):
                await asyncio.sleep(LOOK_S)
