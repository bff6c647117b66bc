"""Two daemons as they are run, each in a network of its own, that reach each other as peers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

from qmpd.pki.directory import Pki
from tests.process.test_serve import Place, started
from tests.unavailable import need_root, tool

ADDRESSES = {"a": "10.123.0.1", "b": "10.123.0.2"}
PORT = 8443
#: `ip` needs milliseconds; on a shared machine seconds.
TOOL_DEADLINE_S = 60.0


def ip(*words: str) -> None:
    """The command `ip`, which must work."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=TOOL_DEADLINE_S)


@contextmanager
def networks() -> Iterator[dict[str, str]]:
    """Two network namespaces, joined by a wire; their names by that of the daemon in each."""
    need_root("make network namespaces")
    tool("ip", "iproute2")
    names = {name: f"qmpd-{name}-{os.getpid()}" for name in ADDRESSES}
    with ExitStack() as undo:
        for name in names.values():
            ip("netns", "add", name)
            undo.callback(ip, "netns", "delete", name)
        ip("link", "add", "wire", "netns", names["a"], "type", "veth", "peer", "name", "wire", "netns", names["b"])
        for name, namespace in names.items():
            ip("-n", namespace, "address", "add", f"{ADDRESSES[name]}/24", "dev", "wire")
            ip("-n", namespace, "link", "set", "wire", "up")
        yield names


def places(directory: Path) -> dict[str, Place]:
    """Where each daemon keeps everything, with a certificate, and the other one as its peer. Blocks."""
    authority = Pki(directory / "ca")
    authority.init("lab")
    made = {}
    for name, other in (("a", "b"), ("b", "a")):
        (directory / name).mkdir()
        authority.store(directory / name / "pki", authority.issue(name, "peer", (ADDRESSES[name],)))
        made[name] = Place(directory / name)
        made[name].configure(listen=[f"{ADDRESSES[name]}:{PORT}"], pki_dir=f"{directory}/{name}/pki")
        with made[name].config.open("a") as config:
            config.write(f'[[peers]]\nname = "{other}"\nurl = "https://{ADDRESSES[other]}:{PORT}"\n')
    return made


async def test_daemons_in_two_networks_reach_each_other_as_peers(short_directory: Path) -> None:
    made = places(short_directory)
    with networks() as names:
        async with AsyncExitStack() as stack:
            daemons = {}
            for name, place in made.items():
                daemons[name] = await stack.enter_async_context(started(place, command=("ip", "netns", "exec", names[name])))
                await daemons[name].ready()
            for name, other in (("a", "b"), ("b", "a")):
                health = await daemons[name].ask("GET", f"/peers/{other}/health")
                assert (health["name"], health["reachable"], health["problem"]) == (other, True, None)
                assert isinstance(health["greeting"], dict)
                assert health["greeting"]["peer"] == name
            assert await daemons["b"].stop() == 0
            health = await daemons["a"].ask("GET", "/peers/b/health")
            assert (health["reachable"], health["code"]) == (False, "peer_unavailable")
            assert await daemons["a"].stop() == 0


async def test_settings_that_contradict_themselves_are_named(short_directory: Path) -> None:
    place = Place(short_directory)
    with place.config.open("a") as config:
        config.write('[[peers]]\nname = "b"\nurl = "https://b:1"\n[[peers]]\nname = "b"\nurl = "https://c:1"\n')
    async with started(place) as daemon:
        assert await daemon.ended() == os.EX_CONFIG
        assert "peers[1]: another peer has the name 'b' as well" in daemon.log
