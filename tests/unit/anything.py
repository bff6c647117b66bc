"""Any definition that decodes, in any world: strategies made from the document types themselves."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, Final, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from qmpd.board import NamedBoard
from qmpd.facts import AcceleratorFacts, EmulatorFacts, FileFacts, MachinePaths, MachineType, World
from qmpd.spec import BaseImage, DiskFormat, MachineSpec
from tests.golden.worlds import CATALOGUE, everything

#: Few, so that they meet: a path that is there, one that is not, one that is used twice.
PATHS: Final = ("/srv/a.img", "/srv/b.img", "/srv/c.iso", "/srv/fw.bin", "/srv/a,b=c.qcow2")
BOARDS: Final = tuple(CATALOGUE.boards.values())
BUSES: Final = tuple(sorted({bus for named in BOARDS for bus in named.board.disks}))
MODELS: Final = tuple(sorted({model for named in BOARDS for model in named.board.nics}))
DEVICES: Final = ("isa-debugcon", "virtio-rng-pci", "nvme", "VGA")
CPUS: Final = ("max", "host", "qemu64")

#: Also what no JSON has: a definition may have come in as TOML or msgpack.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.just(datetime.date(2020, 1, 1))
)
OBJECTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.tuples(st.integers())), inner, max_size=3),
    ),
    max_leaves=6,
)

#: Fields whose values mean something only if somebody else knows them.
BY_NAME: Final[dict[str, st.SearchStrategy[object]]] = {
    "bus": st.sampled_from((None, *BUSES, "nosuchbus")),
    "model": st.sampled_from((None, *MODELS, *CPUS, "nosuchmodel")),
    "device": st.sampled_from((None, *DEVICES, "nosuchdevice")),
    "machine": st.sampled_from((None, "q35", "virt", "nosuchmachine")),
    "path": st.sampled_from(PATHS),
    "base": st.recursive(
        st.none(),
        lambda below: st.builds(BaseImage, path=st.sampled_from(PATHS), format=st.sampled_from(get_args(DiskFormat)), base=below),
    ),
    "image": st.sampled_from(PATHS),
    "code": st.sampled_from(PATHS),
    "vars": st.sampled_from(PATHS),
    "initrd": st.sampled_from((None, *PATHS)),
    "dtb": st.sampled_from((None, *PATHS)),
    "boot_order": st.lists(st.sampled_from(("disk", "cdrom", "network")), max_size=3).map(tuple),
    "extra_args": st.lists(st.sampled_from(("-rtc", "base=utc", "-m", "-S", "x", "--", "-name", "-M")), max_size=4).map(tuple),
    "count": st.one_of(st.none(), st.integers(1, 4096)),
}


def of(kind: inspect.Type) -> st.SearchStrategy[object]:
    """Every value msgspec would decode for a type."""
    match kind:
        case inspect.StructType():
            fields = {field.name: of_field(field) for field in kind.fields}
            required = {field.name: fields.pop(field.name) for field in kind.fields if field.required}
            return st.fixed_dictionaries(required, optional=fields).map(lambda given: kind.cls(**given))
        case inspect.Metadata():
            return of(kind.type)
        case inspect.UnionType():
            return st.one_of([of(member) for member in kind.types])
        case inspect.DictType():
            return st.dictionaries(of(kind.key_type), of(kind.value_type), max_size=3)
        case inspect.VarTupleType():
            return st.lists(of(kind.item_type), max_size=4).map(tuple)
        case inspect.StrType():
            return _text(kind)
        case inspect.IntType() | inspect.FloatType():
            return _number(kind)
    return OTHERS[type(kind)](kind)


OTHERS: Final[dict[type[inspect.Type], Callable[[Any], st.SearchStrategy[object]]]] = {
    inspect.LiteralType: lambda kind: st.sampled_from(kind.values),
    inspect.BoolType: lambda _: st.booleans(),
    inspect.NoneType: lambda _: st.none(),
    inspect.CustomType: lambda _: OBJECTS,  # `object`
}


def _number(kind: inspect.IntType | inspect.FloatType) -> st.SearchStrategy[object]:
    if isinstance(kind, inspect.IntType):
        return st.integers(kind.ge, kind.le)
    return st.floats(kind.ge, kind.le)


def of_field(field: inspect.Field) -> st.SearchStrategy[object]:
    """Every value of a field, or those that are worth trying."""
    return BY_NAME[field.name] if field.name in BY_NAME else of(field.type)


def _text(kind: inspect.StrType) -> st.SearchStrategy[str]:
    text = st.text(max_size=16) if kind.pattern is None else st.from_regex(kind.pattern)
    limit = kind.max_length
    return text if limit is None else text.filter(lambda value: len(value) <= limit)


DOCUMENT: Final = inspect.type_info(MachineSpec)
assert isinstance(DOCUMENT, inspect.StructType)
FIELDS: Final = {field.name: of_field(field) for field in DOCUMENT.fields if field.name != "board"}


@st.composite
def specs(draw: st.DrawFn, named: NamedBoard) -> MachineSpec:
    """A definition that uses everything its board offers, with a few fields that are anything at all."""
    names = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=6))
    base = draw(st.sampled_from((everything(named), MachineSpec(name="plain", board=named.id))))
    return msgspec.structs.replace(base, **{name: draw(FIELDS[name]) for name in sorted(names)})


#: With those that the definitions of tests/golden name.
EVERY_PATH: Final = (*PATHS, "/srv/disk.img", "/srv/vmlinuz", "/srv/initrd", "/srv/board.dtb", "/srv/firmware.bin")
GOOD: Final = FileFacts(kind="file", size=1 << 26, readable=True, writable=True)
FILES = st.builds(
    FileFacts,
    kind=st.sampled_from(("file", "file", "file", "directory", "missing", "special", "denied")),
    size=st.integers(0, 1 << 40),
    readable=st.booleans(),
    writable=st.booleans(),
    real_path=st.sampled_from(("", *PATHS)),
    magic=st.sampled_from((None, "qcow2", "vmdk", "elf")),
    refusal=st.sampled_from((None, None, "is not for you")),
)


@st.composite
def worlds(draw: st.DrawFn, named: NamedBoard) -> World:
    """A host with an emulator that may or may not have what the board needs."""
    board = named.board
    machines = [
        MachineType(name=f"{board.machine}-7.2", alias=board.machine, cpu_max=draw(st.integers(1, 512)), deprecated=draw(st.booleans()))
    ]
    emulator = EmulatorFacts(
        path=f"/usr/bin/qemu-system-{board.emulators[0]}",
        target=board.emulators[0],
        version=draw(st.sampled_from(("7.2.22", "9.0.0", "11.1.50"))),
        machines=tuple(draw(st.sampled_from((machines, machines, machines, [])))),
        cpus=draw(st.sampled_from(((), CPUS))),
        devices=frozenset(draw(st.sampled_from(((), DEVICES)))),
        options=frozenset(draw(st.sets(st.sampled_from(("sandbox", "action"))))),
        accelerators=frozenset(draw(st.sampled_from((("tcg",), ("tcg", "kvm"))))),
    )
    verdict = draw(
        st.sampled_from(
            (
                AcceleratorFacts(usable=True, reason="measured", ratio=12.0),
                AcceleratorFacts(usable=False, reason="slow", ratio=0.5),
                AcceleratorFacts(usable=False, reason="no device"),
            )
        )
    )
    return World(
        emulator=emulator,
        host_arch=draw(st.sampled_from(("x86_64", "aarch64", "riscv64"))),
        kvm=verdict,
        paths=MachinePaths(run="/run/q,m", state="/var/lib/q m"),
        files={**dict.fromkeys(EVERY_PATH, GOOD), **draw(st.dictionaries(st.sampled_from(EVERY_PATH), FILES, max_size=2))},
        raw_options=draw(st.sampled_from((True, True, False))),
    )
