"""A new machine: its place, its images and its definition; and, where it is to be started at once, its QEMU's way to the gate meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from qmpd.launching import HeadStart, Launch, ahead
from qmpd.machine import Machine, now
from qmpd.record import Definition
from qmpd.registry import Registry
from qmpd.spec import MachineSpec
from qmpd.storage import clear_unfinished, furnish, make_place, mark_finished, remove_machine_files
from qmpd.store import Unknown
from qmpd.tasks import undivided


async def created(registry: Registry, spec: MachineSpec, made: Launch) -> Machine:
    """Stores a completed definition and makes its disks, under a reserved name. When it cannot be stored nothing is left.

    Raises:
        Held: a QEMU runs from the files of this name, or they are a forgotten machine's.
        AlreadyExists: there are files of a machine whose definition was lost.
        NoSpace, HostError: its files cannot be made.
        Unknown: it may be stored.
    """
    # A thread goes on when its caller is cancelled: nobody may clear up, or use the name again, before it has ended.
    await undivided(asyncio.to_thread(_place(registry, spec.name, made)), f"place:{spec.name}")
    try:
        await undivided(furnish(made.plan), f"make:{spec.name}")
        return await registry.create(_definition(spec))
    except Unknown:
        raise  # it may be stored: the next daemon knows, and does what is right with the files
    except BaseException:
        # Not so for a caller that went away meanwhile: what was stored has its files.
        await asyncio.to_thread(clear_unfinished, made.state_dir)
        raise


def can_hurry(made: Launch) -> bool:
    """Whether a machine can be created and launched in one go: nothing has to be made that takes its time."""
    return not (made.plan.blank_images or made.plan.copies or made.plan.tpm) and made.confiner is None


@asynccontextmanager
async def hurried(registry: Registry, spec: MachineSpec, made: Launch) -> AsyncIterator[tuple[Machine, Launch]]:
    """The same as `created`, for a machine that is started in the block: its QEMU gets as far as the gate while the definition is stored.

    The mark of an unfinished machine stays until the gate was opened, or the block is left. So the launch record of a machine that was
    never stored, with a gate that has not ended yet, is known for what it is.
    """
    async with ahead(made, definition := _definition(spec), _place(registry, spec.name, made)) as head:
        try:
            machine = await registry.create(definition, marked=True)
        except Unknown:
            raise  # it may be stored: see above
        except BaseException:
            await undivided(_taken_back(registry, spec.name, made, head), f"take-back:{spec.name}")
            raise
        try:
            yield machine, msgspec.structs.replace(made, head_start=head)
        except BaseException:
            await asyncio.to_thread(mark_finished, made.state_dir)  # the machine does it as soon as its gate is open
            raise


async def _taken_back(registry: Registry, name: str, made: Launch, head: HeadStart) -> None:
    """Clears up after a definition that was not stored. If it was, for a caller that went away meanwhile, it has its files."""
    await head.give_up()
    if registry.known(name) is not None:
        await asyncio.to_thread(mark_finished, made.state_dir)
        return
    await asyncio.to_thread(remove_machine_files, made.run_dir)
    await asyncio.to_thread(clear_unfinished, made.state_dir)


def _definition(spec: MachineSpec) -> Definition:
    moment = now()
    return Definition(spec=spec, uuid=spec.uuid or "", created_at=moment, changed_at=moment)


def _place(registry: Registry, name: str, made: Launch) -> Callable[[], None]:
    def place() -> None:
        registry.check_vacant(name)
        make_place(made.state_dir)

    return place
