"""Which emulators there are on this host, and what each says about itself.

An emulator is asked once, in a throw-away process with no machine; the answer is kept in memory and in a cache file for as long as
the binary (and the program behind it, where it is a script) has the same size and modification time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd import emulatorfiles, factcache
from qmpd.emulatorfiles import PREFIX, Found, Stamp
from qmpd.errors import NotFound, QemuError, QemuRefused, QemuSilent
from qmpd.facts import EmulatorFacts, Facts, MachineType
from qmpd.schema import FEATURE_MARKS, Entity, Schema, features
from qmpd.throwaway import Throwaway, throwaway

log = logging.getLogger(__name__)

#: An emulator answers everything in 0.2 s; a hundred times that is a hung one, not a slow host.
PROBE_DEADLINE_S: Final = 20.0
#: More at once would be no faster on a small host, and would take the processors from running machines on any.
PARALLEL_PROBES: Final = 2
#: Changes whenever EmulatorFacts means something else than before.
CACHE_FORMAT: Final = 1
CACHE_FILE: Final = "emulators.msgpack"
#: TCG where it was built in; qtest (which runs nothing) lets a KVM-only build answer without /dev/kvm.
NO_MACHINE: Final = ("-machine", "none", "-accel", "tcg", "-accel", "qtest")


class ProbeProblem(Facts, frozen=True):
    """An emulator that was found but could not be asked, and why."""

    path: str
    message: str


class Probed(Facts, frozen=True):
    """A cache entry: the facts, and every file they depend on."""

    stamps: tuple[Stamp, ...]
    facts: EmulatorFacts


class CacheFile(Facts, frozen=True):
    """The cache file. `marks` are the feature marks that were asked for when it was written."""

    format: int
    marks: tuple[str, ...]
    emulators: tuple[Probed, ...]


class Failed(Facts, frozen=True):
    """A failure to probe, remembered while the file is the same, so that a listing does not wait for it again."""

    stamp: Stamp | None
    error: QemuError


class Emulators:
    """The emulators on PATH and in the configured places (files, or directories of builds); configured ones come first.

    `find` and `names` answer at once from the last `scan`; `all` and `get` scan by themselves.
    """

    def __init__(
        self, cache_dir: str | None, configured: Sequence[str] = (), search_path: str | None = None, *, deadline_s: float = PROBE_DEADLINE_S
    ) -> None:
        self._cache = None if cache_dir is None else Path(cache_dir) / CACHE_FILE
        self._configured = tuple(configured)
        self._search_path = os.environ.get("PATH", os.defpath) if search_path is None else search_path
        self._deadline_s = deadline_s
        self._found = Found(by_name={}, by_path={}, places=())
        self._known: dict[str, Probed] | None = None
        self._failed: dict[str, Failed] = {}
        self._busy: dict[str, asyncio.Lock] = {}
        self._slots = asyncio.Semaphore(PARALLEL_PROBES)
        self._cache_access = asyncio.Lock()

    async def scan(self) -> None:
        """Look for emulators again, without starting any."""
        self._found = await asyncio.to_thread(emulatorfiles.look, self._configured, self._search_path)

    def names(self) -> tuple[str, ...]:
        """The file names under which emulators were found, sorted."""
        return tuple(sorted(self._found.by_name))

    def find(self, name_or_path: str) -> Path | None:
        """The emulator `x86_64`, `qemu-system-x86_64` or `/opt/build/qemu-system-x86_64`, if the last scan found it.

        A path must lead to an emulator on PATH or in a configured place: qmpd executes nothing else.
        """
        found = self._found
        if "/" in name_or_path:
            path = found.by_path.get(name_or_path)
        else:
            path = found.by_name.get(name_or_path) or found.by_name.get(PREFIX + name_or_path)
        return None if path is None else Path(path)

    async def get(self, name_or_path: str) -> EmulatorFacts:
        """The facts about one emulator; asks it, and only it, if it changed, failed to answer before or was never asked.

        Raises:
            NotFound: there is no such emulator; the message says where it was looked for and which package has it.
            LaunchFailed: it is there but does not start or does not speak QMP; details carry its stderr.
            QemuRefused: it speaks QMP but refused a question every emulator must answer.
            QemuSilent: it did not answer within PROBE_DEADLINE_S.
        """
        remembered = await self._remembered(name_or_path)
        if remembered is not None:
            return remembered
        await self._rescan()
        path = self.find(name_or_path)
        if path is None:
            await self.scan()  # a file may have become executable, which no directory shows
            path = self.find(name_or_path)
        if path is None:
            raise NotFound(self._where(name_or_path), emulator=name_or_path)
        fresh = await self._fresh([str(path)])
        if fresh:
            return fresh[str(path)]
        facts = await self._ask(str(path))
        await self._save()
        return facts

    async def all(self) -> list[EmulatorFacts | ProbeProblem]:
        """What every emulator said of itself, or why it could not be asked, by file name; one that has two names occurs once."""
        await self._rescan()
        paths = sorted(set(self._found.by_name.values()), key=lambda path: (Path(path).name, path))
        fresh = await self._fresh(paths)
        stale = [path for path in paths if path not in fresh]
        async with asyncio.TaskGroup() as group:
            asked = {path: group.create_task(self._ask_or_problem(path), name=f"probe {path}") for path in stale}
        if any(path not in self._failed for path in stale):
            await self._save()
        return [fresh[path] if path in fresh else asked[path].result() for path in paths]

    async def _remembered(self, name_or_path: str) -> EmulatorFacts | None:
        """The usual case in one step: nothing changed, neither in the places nor this emulator."""
        path = self.find(name_or_path)
        entry = None if path is None or self._known is None else self._known.get(str(path))
        found = self._found

        def unchanged(entry: Probed) -> bool:
            return _unchanged(entry) and emulatorfiles.still_right(found, self._configured, self._search_path)

        return entry.facts if entry is not None and await asyncio.to_thread(unchanged, entry) else None

    async def _rescan(self) -> None:
        """Scan if a directory or a configured file changed since the last time."""
        if not await asyncio.to_thread(emulatorfiles.still_right, self._found, self._configured, self._search_path):
            await self.scan()

    async def _fresh(self, paths: Sequence[str]) -> dict[str, EmulatorFacts]:
        """The remembered facts about those of these emulators that did not change since."""
        known = await self._load()
        entries = {path: known[path] for path in paths if path in known}
        unchanged = await asyncio.to_thread(lambda: [path for path, entry in entries.items() if _unchanged(entry)])
        return {path: entries[path].facts for path in unchanged}

    async def _ask_or_problem(self, path: str) -> EmulatorFacts | ProbeProblem:
        failed = self._failed.get(path)
        if failed is None or failed.stamp != await asyncio.to_thread(emulatorfiles.stamp, path):
            try:
                return await self._ask(path)
            except QemuError as error:
                return ProbeProblem(path=path, message=error.message)
        return ProbeProblem(path=path, message=failed.error.message)

    async def _ask(self, path: str) -> EmulatorFacts:
        """Probe this emulator. Whoever comes while somebody else's probe of it runs gets the outcome of that one."""
        before = self._failed.get(path)
        async with self._busy.setdefault(path, asyncio.Lock()):
            fresh = await self._fresh([path])
            if fresh:
                return fresh[path]
            meanwhile = self._failed.get(path)
            if meanwhile is not None and meanwhile is not before:
                raise meanwhile.error
            async with self._slots:
                return await self._probe(path)

    async def _probe(self, path: str) -> EmulatorFacts:
        known = await self._load()
        # Before the probe: a binary that is replaced meanwhile does not match, and is asked again.
        stamp = await asyncio.to_thread(emulatorfiles.stamp, path)
        try:
            facts, program = await probe(path, self._deadline_s)
        except QemuError as error:
            self._failed[path] = Failed(stamp=stamp, error=error)
            raise
        behind = None if program is None or program == path else await asyncio.to_thread(emulatorfiles.stamp, program)
        known[path] = Probed(stamps=tuple(item for item in (stamp, behind) if item is not None), facts=facts)
        self._failed.pop(path, None)
        return facts

    async def _load(self) -> dict[str, Probed]:
        """The entries in memory, read from the cache file the first time."""
        async with self._cache_access:
            if self._known is None:
                cached = None if self._cache is None else await asyncio.to_thread(factcache.read, self._cache, CacheFile)
                fits = cached is not None and (cached.format, cached.marks) == (CACHE_FORMAT, FEATURE_MARKS)
                self._known = {entry.facts.path: entry for entry in cached.emulators} if cached is not None and fits else {}
            return self._known

    async def _save(self) -> None:
        """Write the cache file; where it cannot be written, the next daemon asks again, and that is all."""
        if self._cache is None:
            return
        known = await self._load()
        async with self._cache_access:
            try:
                await asyncio.to_thread(_write_cache, self._cache, tuple(known.values()))
            except OSError as error:
                log.warning("the emulator cache %s cannot be written: %s", self._cache, error.strerror)

    def _where(self, wanted: str) -> str:
        """Why there is no such emulator, and what to do about it."""
        if "/" in wanted:
            return f"{wanted} is not an executable emulator on PATH or in a configured place; name it in the setting `emulators`"
        name = wanted if wanted.startswith(PREFIX) else PREFIX + wanted
        places = ", ".join((*self._configured, f"PATH ({self._search_path})"))
        package = package_of(name.removeprefix(PREFIX))
        return f"no {name} in {places}: install {package} (Debian's name for it), or name an own build in the setting `emulators`"


async def probe(path: str, deadline_s: float = PROBE_DEADLINE_S) -> tuple[EmulatorFacts, str | None]:
    """Ask this emulator about itself in a process of its own; also the program that really ran.

    Raises:
        LaunchFailed, QemuRefused: as in `Emulators.get`.
        QemuSilent: not done within the deadline; the process is gone.
    """
    try:
        async with asyncio.timeout(deadline_s), throwaway(path, NO_MACHINE) as emulator:
            return await _interview(path, emulator), await emulator.program()
    except TimeoutError as error:
        raise QemuSilent(f"{path} did not say what it can within {deadline_s:.0f} s, and was killed") from error


class Target(msgspec.Struct, frozen=True):
    """The answer to `query-target`."""

    arch: str


class Named(msgspec.Struct, frozen=True):
    """An entry of which only the name counts."""

    name: str


class OptionGroup(msgspec.Struct, frozen=True):
    """An entry of `query-command-line-options`."""

    option: str


class MachineEntry(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `query-machines`."""

    name: str
    alias: str | None = None
    cpu_max: int = 1
    default_cpu_type: str | None = None
    default_ram_id: str | None = None
    deprecated: bool = False

    def fact(self) -> MachineType:
        """The entry in qmpd's words."""
        return MachineType(
            name=self.name,
            alias=self.alias,
            cpu_max=self.cpu_max,
            default_cpu=self.default_cpu_type,
            default_ram_id=self.default_ram_id,
            deprecated=self.deprecated,
        )


async def _interview(path: str, emulator: Throwaway) -> EmulatorFacts:
    target = await emulator.command("query-target", Target)
    machines = await emulator.command("query-machines", list[MachineEntry])
    schema = Schema(await emulator.command("query-qmp-schema", list[Entity]))
    devices = await emulator.command("qom-list-types", list[Named], {"implements": "device", "abstract": False})
    accelerators = await emulator.command("qom-list-types", list[Named], {"implements": "accel", "abstract": False})
    options = await emulator.command("query-command-line-options", list[OptionGroup])
    return EmulatorFacts(
        path=path,
        target=target.arch,
        version=emulator.version,
        machines=tuple(machine.fact() for machine in sorted(machines, key=lambda machine: machine.name)),
        cpus=await _cpus(emulator),
        devices=frozenset(device.name for device in devices),
        commands=schema.commands,
        features=features(schema),
        options=frozenset(group.option for group in options if group.option),
        accelerators=frozenset(kind.name.removesuffix("-accel") for kind in accelerators) & {"kvm", "tcg"},
    )


async def _cpus(emulator: Throwaway) -> tuple[str, ...]:
    """The CPU models, sorted; empty where the target has no such command, or has it and refuses (QEMU 11 lists it everywhere)."""
    try:
        definitions = await emulator.command("query-cpu-definitions", list[Named])
    except QemuRefused:
        return ()
    return tuple(sorted(definition.name for definition in definitions))


def _write_cache(path: Path, entries: Sequence[Probed]) -> None:
    """Write the entries that still hold; those of emulators that are gone or were replaced are dropped."""
    kept = tuple(entry for entry in entries if _unchanged(entry))
    factcache.write(path, CacheFile(format=CACHE_FORMAT, marks=FEATURE_MARKS, emulators=kept))


def _unchanged(entry: Probed) -> bool:
    return all(emulatorfiles.stamp(stamp.path) == stamp for stamp in entry.stamps)


#: Debian's packages by target; the other targets are in qemu-system-misc.
PACKAGES: Final[Mapping[str, frozenset[str]]] = {
    "qemu-system-x86": frozenset({"x86_64", "i386"}),
    "qemu-system-arm": frozenset({"arm", "aarch64"}),
    "qemu-system-ppc": frozenset({"ppc", "ppc64", "ppc64le"}),
    "qemu-system-mips": frozenset({"mips", "mipsel", "mips64", "mips64el"}),
    "qemu-system-sparc": frozenset({"sparc", "sparc64"}),
}


def package_of(target: str) -> str:
    """The Debian package that has the emulator of this target."""
    return next((package for package, targets in PACKAGES.items() if target in targets), "qemu-system-misc")
