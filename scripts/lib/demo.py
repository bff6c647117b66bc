"""Boots real firmware, boot loaders, kernels and installers on a dozen architectures, at the same time, through qmpd's API.

Starts a daemon of its own, leaves nothing behind, and exits with 0 only if every machine got where it should.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpd.errors import QmpdError
from qmpd_api.client import Client
from scripts.lib import demo_daemon, demo_table
from scripts.lib.demo_boards import BOARDS
from scripts.lib.demo_boots import Boot, discard, run, watch
from scripts.lib.demo_daemon import Daemon, DaemonFailed
from scripts.lib.demo_guests import Unusable, chosen, default
from scripts.lib.progress import say

ROOT: Final = Path(__file__).resolve().parents[2]
MEMINFO: Final = Path("/proc/meminfo")
#: Firmware and boot loaders mostly wait; twice the processors keeps them busy. Beyond four at a time nothing ends sooner.
MOST_AT_A_TIME: Final = 4
#: What the largest of the guests takes, QEMU included.
MACHINE_MIB: Final = 1024
#: How often the table is drawn: as often as one can read.
REFRESH_S: Final = 0.5


def main() -> int:
    """Show the machines; 0 when all were reached, 1 when not, 2 when the demo itself could not run."""
    os.environ.pop("PYTHONPATH", None)
    options = _options()
    try:
        return asyncio.run(_main(options))
    except (DaemonFailed, Unusable, QmpdError) as error:
        say(f"demo: {error}")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("demo: interrupted; its machines and its daemon are gone")
        return 130


async def _main(options: argparse.Namespace) -> int:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with demo_daemon.running(ROOT / ".cache" / "demo") as daemon:
        say("demo: asking the emulators of this host what they can do")
        boots = await _boots(daemon.client, options.only)
        say(f"demo: booting {len(boots)} machines, {_at_a_time()} at a time")
        try:
            with demo_table.display(as_json=options.json) as display:
                await _run_all(daemon.client, boots, display, keep=options.keep)
            daemon.kept = options.keep
        finally:
            if not daemon.kept:
                await _discard_all(daemon.client)
        _report(boots, options, daemon)
    return 0 if all(boot.reached for boot in boots) else 1


async def _boots(client: Client, only: Sequence[str]) -> tuple[Boot, ...]:
    views = await client.boards()
    names = only or BOARDS
    idle = [f"{view.id}: {view.reason}" for view in views if view.id in names and not view.runnable]
    if idle:
        raise Unusable("; ".join(idle))
    boards = [await client.board(view.id) for view in views if view.id in names]
    return tuple(Boot(showing=showing) for showing in (chosen(boards, names) if only else default(boards, names)))


async def _run_all(client: Client, boots: Sequence[Boot], display: demo_table.Display, *, keep: bool) -> None:
    slots = asyncio.Semaphore(_at_a_time())
    clock = asyncio.get_running_loop().time

    async def in_turn(boot: Boot) -> None:
        async with slots:
            await run(client, boot, keep=keep)

    by_name = {boot.showing.spec.name: boot for boot in boots}
    async with asyncio.TaskGroup() as group:
        pending = {group.create_task(in_turn(boot), name=f"boot:{boot.showing.board}") for boot in boots}
        while pending:
            display.update(boots, clock())
            _, pending = await asyncio.wait(pending, timeout=REFRESH_S)
            await watch(client, by_name)
    display.update(boots, clock())


async def _discard_all(client: Client) -> None:
    """Machines outlive their daemon, so they are ended first."""
    try:
        for view in (await client.machines()).machines:
            await discard(client, view.name)
    except QmpdError as error:
        say(f"demo: machines may be left behind: {error.message}")


def _at_a_time() -> int:
    available_kib = int(dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())["MemAvailable"].split()[0])
    return max(1, min(MOST_AT_A_TIME, 2 * len(os.sched_getaffinity(0)), available_kib // 1024 // MACHINE_MIB))


def _report(boots: Sequence[Boot], options: argparse.Namespace, daemon: Daemon) -> None:
    reached = [boot for boot in boots if boot.reached]
    for boot in boots:
        if not boot.reached:
            say(demo_table.failure(boot))
    architectures = len({boot.showing.arch for boot in reached})
    say(f"demo: {len(reached)} of {len(boots)} machines reached their milestone; architectures: {architectures}")
    # One that can be talked to, if there is one.
    example = next((boot for boot in reached if boot.showing.guest.send), boots[-1]).showing
    if options.keep:
        say(_by_hand(boots, example.spec.name, daemon))
    else:
        say(f"demo: to go on by hand: scripts/demo --keep --only {example.board}   (without --only: all of them)")


def _by_hand(boots: Sequence[Boot], name: str, daemon: Daemon) -> str:
    qmpctl, pid = ROOT / ".venv/bin/qmpctl", daemon.process.pid
    return f"""
The daemon (pid {pid}) and its machines are still there; the machines are paused.
    export QMPD_SOCKET={daemon.client.target}
    {qmpctl} list
    {qmpctl} resume {name} && {qmpctl} console {name}
To end all of it:
    {qmpctl} kill {" ".join(boot.showing.spec.name for boot in boots)}
    kill {pid}; tail --pid={pid} -f /dev/null; rm -r {daemon.directory}"""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object per machine on stdout, as each finishes")
    parser.add_argument("--keep", action="store_true", help="leave the daemon and its machines there, and say how to use them")
    parser.add_argument("--only", nargs="+", metavar="BOARD", default=[], help="boot these boards only (see qmpctl boards)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
