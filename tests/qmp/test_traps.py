"""What the library would do with a hostile peer, and our session does not: each trap that was seen in 0.0.6 has its test here."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qemu.qmp import EventListener, Message

from qmpd import lines
from qmpd.backlog import EVENTS_LIMIT
from qmpd.errors import QemuDied, QemuSilent, TooLarge
from qmpd.lines import LINE_LIMIT
from qmpd.monitor import EventsLost, Monitor, QmpEvent, connected
from tests.process.emulator import PATIENCE_S, Emulators
from tests.qmp.peer import GREETING, Peer, event, line

MIB = 1024 * 1024

NONSENSE = {
    "junk": (b"not JSON at all\n", "a line of 16 bytes that is not JSON"),
    "a megabyte of junk": (b"x" * MIB + b"\n", "a line of 1048577 bytes that is not JSON"),
    "an array": (b"[1]\n", "a list where a message belongs"),
    "a string": (b'"hello"\n', "a str where a message belongs"),
    "deep arrays": (b"[" * 100_000 + b"\n", "not JSON: maximum recursion depth"),
    "deep objects": (b'{"a":' * 100_000 + b"\n", "not JSON: maximum recursion depth"),
    "deep and whole": (b'{"event":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "not JSON: maximum recursion depth"),
    "bad UTF-8": (b'{"event":"\xff\xfe"}\n', "not JSON: 'utf-8' codec"),
    "a lone surrogate": (b'{"event":"\\ud800"}\n', "not JSON"),
    "a number of 5000 digits": (b'{"return":' + b"9" * 5000 + b',"id":"q1"}\n', "not JSON: Integer value out of range"),
    "a float of 1e400": (b'{"return":1e400,"id":"q1"}\n', "not JSON: Number out of range"),
    "NaN": (b'{"return":NaN,"id":"q1"}\n', "not JSON"),
    "an empty line": (b"\n", "a line of 1 bytes that is not JSON"),
    "two messages in a line": (b"{} {}\n", "not JSON"),
    "an error without id": (line({"error": {"class": "GenericError", "desc": "JSON parse error"}}), "an error that belongs to no command"),
    "an error with null id": (line({"error": {}, "id": None}), "an error that belongs to no command"),
    "the agent's separator": (b'\xff{"return":{}}\n', "not JSON"),
    "a long line that answers nothing": (b" " * (LINE_LIMIT + 1) + b"\n", "a line of 10485762 bytes that answers nothing"),
}

IGNORED = {
    "a list as id": {"return": {}, "id": ["q1"]},
    "an object as id": {"error": {}, "id": {"a": 1}},
    "a number as id": {"return": {}, "id": 1},
    "an id nobody used": {"return": {}, "id": "q999"},
    "a return without id": {"return": {}},
    "an object without meaning": {},
    "an event without a name": {"event": None},
    "an event of a wrong type": {"event": {"a": 1}, "data": [], "timestamp": "now"},
}


@contextmanager
def memory_peak() -> Iterator[list[int]]:
    """A list that holds, after the block, the most bytes that Python had allocated within it beyond those at its beginning."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def log_characters(caplog: pytest.LogCaptureFixture) -> int:
    """How much was logged, fields and tracebacks included; asyncio's own debug log says which selector it uses."""
    records = [record for record in caplog.records if record.name != "asyncio"]
    usual = vars(logging.makeLogRecord({})).keys() - {"exc_text"}
    return sum(len(record.getMessage()) + len(repr({k: v for k, v in vars(record).items() if k not in usual})) for record in records)


@pytest.mark.parametrize("case", NONSENSE)
async def test_nonsense_ends_the_session_with_a_clear_reason_and_a_short_log(
    peer: Peer, fooled: Monitor, logged: pytest.LogCaptureFixture, case: str
) -> None:
    raw, reason = NONSENSE[case]
    logged.clear()
    sending = asyncio.create_task(peer.send(raw), name="peer")
    async with asyncio.timeout(PATIENCE_S):
        why = await fooled.wait_closed()
    assert why.startswith("QEMU's end sent ")
    assert reason in why
    assert len(why) < 400
    await asyncio.gather(sending, return_exceptions=True)
    assert log_characters(logged) < 1024


@pytest.mark.parametrize("case", IGNORED)
async def test_messages_that_answer_nothing_are_ignored(peer: Peer, fooled: Monitor, case: str) -> None:
    call = asyncio.create_task(fooled.execute("query-status"), name="caller")
    command = await peer.received.get()
    await peer.send(line(IGNORED[case]))
    await peer.reply(command["id"], "answer")
    await peer.reply(command["id"], "the same again")
    assert await call == "answer"
    await peer.event("STOP")
    async with asyncio.timeout(PATIENCE_S):
        while (item := await anext(fooled.events())) == EventsLost(count=1):
            pass
    assert isinstance(item, QmpEvent)
    assert item.name == "STOP"
    assert fooled.closed is None


async def test_a_line_without_end_is_cut_off_and_takes_bounded_memory(
    peer: Peer, fooled: Monitor, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lines, "SKIP_LIMIT", 32 * MIB)
    logged.clear()

    async def babble() -> None:
        while True:
            await peer.send(b"x" * MIB)

    with memory_peak() as peak:
        babbling = asyncio.create_task(babble(), name="peer")
        async with asyncio.timeout(PATIENCE_S):
            assert "without an end of line" in await fooled.wait_closed()
    babbling.cancel()
    await asyncio.gather(babbling, return_exceptions=True)
    assert peak[0] < 4 * LINE_LIMIT
    assert log_characters(logged) < 1024


@pytest.mark.qemu
async def test_an_answer_that_is_too_long_fails_that_call_only(emulators: Emulators) -> None:
    qemu = await emulators.start(machine="q35")
    async with qemu.session() as monitor:
        with pytest.raises(TooLarge, match="at most 10485760 are read"):
            await monitor.execute("human-monitor-command", {"command-line": "xp /3000000xb 0"})
        assert await monitor.execute("query-status")
        long = await monitor.execute("human-monitor-command", {"command-line": "xp /500000xb 0"})
        assert isinstance(long, str)
        assert len(long) > 2_000_000
        assert not monitor.silent


async def test_events_nobody_reads_are_kept_in_bounds_and_starve_nobody(peer: Peer, fooled: Monitor) -> None:
    async def storm() -> None:
        for _ in range(10):
            await peer.send(b"".join(event("FAKE", number=number) for number in range(1_000)))

    with memory_peak() as peak:
        storming = asyncio.create_task(storm(), name="peer")
        for _ in range(5):
            call = asyncio.create_task(fooled.execute("query-status"), name="caller")
            await peer.reply((await peer.received.get())["id"], "answer")
            assert await call == "answer"
        await storming
    # The socket's buffers, and those of both ends' streams, belong to this process.
    assert peak[0] < 4 * MIB
    assert fooled._session.events.history == ()
    peer.hang_up()
    async with asyncio.timeout(PATIENCE_S):
        items = [item async for item in fooled.events()]
    assert len(items) <= EVENTS_LIMIT
    assert isinstance(items[0], EventsLost)


async def test_a_listener_of_the_library_that_raises_cannot_end_the_session(peer: Peer, fooled: Monitor) -> None:
    def refuse(_message: Message) -> bool:
        raise RuntimeError

    fooled._session.register_listener(EventListener(event_filter=refuse))
    await peer.event("RESET")
    assert isinstance(await anext(fooled.events()), QmpEvent)
    assert fooled.closed is None


async def fail_at_the_first_event(monitor: Monitor) -> None:
    async for _ in monitor.events():
        raise ZeroDivisionError


async def test_a_reader_of_events_that_raises_does_not_end_the_session(peer: Peer, fooled: Monitor) -> None:
    await peer.event("RESET")
    with pytest.raises(ZeroDivisionError):
        await fail_at_the_first_event(fooled)
    await peer.event("STOP")
    assert isinstance(await anext(fooled.events()), QmpEvent)


async def test_no_message_is_ever_formatted_for_a_log(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    def formatted(_message: Message) -> str:
        pytest.fail("costs more than parsing it")

    monkeypatch.setattr(Message, "__str__", formatted)
    monkeypatch.setattr(Message, "__repr__", formatted)
    async with connected(peer.path, name="test", peer_pid=None, deadline_s=PATIENCE_S) as monitor:
        call = asyncio.create_task(monitor.execute("human-monitor-command", {"secret": "password"}), name="caller")
        await peer.event("RESET")
        await peer.reply("q999", {"secret": "other"})
        await peer.reply((await peer.received.get())["id"], {"secret": "answer"})
        await call
        await peer.send(line({"error": {"desc": "secret"}}))
        await monitor.wait_closed()
    assert "secret" not in repr([vars(record) for record in logged.records])


async def test_sessions_leave_no_loggers_behind(directory: Path) -> None:
    async with Peer.listening(str(directory / "many")) as peer:
        async with connected(peer.path, name="first", peer_pid=None, deadline_s=PATIENCE_S):
            pass
        before = len(logging.Logger.manager.loggerDict)
        for number in range(20):
            async with connected(peer.path, name=f"machine-{number}", peer_pid=None, deadline_s=PATIENCE_S):
                pass
        assert len(logging.Logger.manager.loggerDict) == before


@pytest.mark.parametrize(
    "greeting",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\xff" * 1000 + b"\n",
        b"[]\n",
        b"{}\n",
        b'{"QMP": 1}\n',
        b'{"QMP": {"version": {}}}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (LINE_LIMIT + 1) + b"\n",
    ],
    ids=["ssh", "bytes", "array", "empty", "number", "no capabilities", "deep", "long"],
)
async def test_a_peer_that_does_not_greet_like_qemu_is_refused(directory: Path, greeting: bytes, logged: pytest.LogCaptureFixture) -> None:
    async with Peer.listening(str(directory / "other"), greeting=greeting) as other:
        with pytest.raises(QemuDied, match="before QEMU was ready") as caught:
            async with connected(other.path, name="test", peer_pid=None, deadline_s=PATIENCE_S):
                pytest.fail("that was no QEMU")
    assert len(caught.value.message) < 400
    assert log_characters(logged) < 1024


#: What is no consent. QEMU 7.2 says something of the kind now and then to the first client it has, which hears well on the next connection.
ODD = {
    "junk": b"junk\n",
    "nothing": line({}),
    "an error": line({"error": {"class": "GenericError", "desc": "no"}}),
    "a second greeting": line(GREETING),
    "a long error": line({"error": {"class": "GenericError", "desc": "no" * 10_000}}),
}


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
async def test_a_qemu_that_answers_its_first_client_oddly_is_asked_again(directory: Path, answer: bytes) -> None:
    async with (
        Peer.listening(str(directory / "odd"), refusals=[answer]) as odd,
        connected(odd.path, name="test", peer_pid=None, deadline_s=PATIENCE_S) as monitor,
    ):
        call = asyncio.create_task(monitor.execute("query-status"), name="caller")
        await odd.reply((await odd.received.get())["id"], "answer")
        assert await call == "answer"
        assert odd.greeted == 2


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
async def test_a_peer_that_never_consents_is_given_up(directory: Path, answer: bytes, logged: pytest.LogCaptureFixture) -> None:
    async with Peer.listening(str(directory / "odd"), greeting=line(GREETING) + answer) as odd:
        with pytest.raises(QemuSilent, match="does not consent") as caught:
            async with connected(odd.path, name="test", peer_pid=None, deadline_s=PATIENCE_S):
                pytest.fail("it did not consent")
        assert odd.greeted == 2
    assert ascii(answer.strip()[:20])[2:-1] in caught.value.message
    assert len(caught.value.message) < 400
    assert log_characters(logged) < 1024


@pytest.mark.parametrize(
    "greeting",
    [b"", b'{"QMP": {"ver', b" " + line(GREETING), b" " + line(GREETING) + event("RESET")],
    ids=["nothing", "half a greeting", "no consent", "an event instead"],
)
async def test_a_peer_that_never_finishes_its_greeting_is_silent(directory: Path, greeting: bytes) -> None:
    async with Peer.listening(str(directory / "other"), greeting=greeting or b" ") as other:
        with pytest.raises(QemuSilent, match="not ready"):
            async with connected(other.path, name="test", peer_pid=None, deadline_s=0.05):
                pytest.fail("it said nothing")


async def test_an_event_before_qemus_consent_is_kept_and_does_not_end_the_negotiation(directory: Path) -> None:
    stormy = b" " + line(GREETING) + event("RESET") * 2 + line({"return": {}})
    async with (
        Peer.listening(str(directory / "stormy"), greeting=stormy) as other,
        connected(other.path, name="test", peer_pid=None, deadline_s=PATIENCE_S) as monitor,
    ):
        assert (await anext(monitor.events())).count == 2


async def test_a_version_that_makes_no_sense_is_unknown(directory: Path) -> None:
    odd = line({"QMP": {"version": {"qemu": {"major": "seven"}}, "capabilities": []}}) + line({"return": {}})
    async with (
        Peer.listening(str(directory / "odd"), greeting=odd) as other,
        connected(other.path, name="test", peer_pid=None, deadline_s=PATIENCE_S) as monitor,
    ):
        assert monitor.version == "unknown"


async def test_a_peer_that_hangs_up_ends_the_session(peer: Peer, fooled: Monitor) -> None:
    peer.hang_up()
    async with asyncio.timeout(PATIENCE_S):
        assert await fooled.wait_closed() == "QEMU closed the connection"
    assert [item async for item in fooled.events()] == []


async def test_a_session_leaves_no_tasks(peer: Peer) -> None:
    before = asyncio.all_tasks()
    async with connected(peer.path, name="test", peer_pid=None, deadline_s=PATIENCE_S):
        pass
    peer.hang_up()
    async with asyncio.timeout(PATIENCE_S):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)
