"""QEMU's own description of its commands (`query-qmp-schema`), and the questions qmpd asks of it.

A *feature mark* is a path from a command into its arguments:

* `migrate.channels`: the command has this argument;
* `netdev_add.type=stream`: the argument is an enumeration (or the tag of a union) that knows this value;
* `netdev_add.type=stream.reconnect-ms`: below that branch of the union there is this member;
* `device_add#json-cli`: the command carries this feature flag.

Arrays, alternates and branches are walked through. Type names in the schema are meaningless numbers, so only paths are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

_CAPABILITIES: Final = (
    "auto-converge", "background-snapshot", "block", "compress", "dirty-bitmaps", "dirty-limit", "late-block-activate", "mapped-ram",
    "multifd", "pause-before-switchover", "postcopy-preempt", "postcopy-ram", "return-path", "switchover-ack", "validate-uuid",
    "x-ignore-shared", "xbzrle", "zero-blocks", "zero-copy-send",
)  # fmt: skip

_PARAMETERS: Final = (
    "avail-switchover-bandwidth", "block-incremental", "compress-level", "cpr-exec-command", "direct-io", "mode=cpr-exec",
    "mode=cpr-reboot", "mode=cpr-transfer", "vcpu-dirty-limit", "zero-page-detection",
)  # fmt: skip

#: Everything that differs between QEMU 7.2 and 11.x and that qmpd decides by. Commands as such are not here: they are `commands`.
FEATURE_MARKS: Final = (
    *(f"migrate-set-capabilities.capabilities.capability={name}" for name in _CAPABILITIES),
    *(f"migrate-set-parameters.{name}" for name in _PARAMETERS),
    "block-export-add.allow-inactive",
    "block-export-add.type=fuse",
    "block-export-add.type=nbd",
    "block-export-add.type=vduse-blk",
    "block-export-add.type=vhost-user-blk",
    "blockdev-mirror.target-is-zero",
    "chardev-add.backend.type=file.data.logtimestamp",
    "chardev-add.backend.type=hub",
    "chardev-add.backend.type=socket.data.reconnect",
    "chardev-add.backend.type=socket.data.reconnect-ms",
    "device_add#json-cli",
    "device_add#json-cli-hotplug",
    "dump-guest-memory.format=kdump-raw-zlib",
    "migrate-incoming.exit-on-error",
    "migrate.channels",
    "migrate.channels.addr.transport=file",
    "migrate.detach",
    "netdev_add.type=dgram",
    "netdev_add.type=l2tpv3",
    "netdev_add.type=passt",
    "netdev_add.type=stream",
    "netdev_add.type=stream.reconnect",
    "netdev_add.type=stream.reconnect-ms",
    "netdev_add.type=user",
    "netdev_add.type=vde",
    "netdev_add.type=vhost-user",
    "object-add.qom-type=iothread",
    "object-add.qom-type=monitor-qmp",
    "screendump.format=png",
    *(f"set-action.panic={value}" for value in ("exit-failure", "none", "pause", "shutdown")),
    *(f"set-action.reboot={value}" for value in ("reset", "shutdown")),
    *(f"set-action.shutdown={value}" for value in ("pause", "poweroff")),
    *(f"set-action.watchdog={value}" for value in ("debug", "inject-nmi", "none", "pause", "poweroff", "reset", "shutdown")),
)


class Member(msgspec.Struct, frozen=True):
    """A member of an object or an alternate, or a value of an enumeration."""

    type: str = ""
    name: str = ""


class Variant(msgspec.Struct, frozen=True):
    """A branch of a union."""

    case: str
    type: str


class Entity(msgspec.Struct, frozen=True):
    """One entry of `query-qmp-schema`; what qmpd has no use for is not kept."""

    name: str
    meta_type: str = msgspec.field(name="meta-type")
    arg_type: str | None = msgspec.field(name="arg-type", default=None)
    element_type: str | None = msgspec.field(name="element-type", default=None)
    members: tuple[Member, ...] = ()
    values: tuple[str, ...] = ()
    tag: str | None = None
    variants: tuple[Variant, ...] = ()
    features: tuple[str, ...] = ()


class Schema:
    """The schema of one emulator; its questions never fail, whatever the emulator left out of it."""

    def __init__(self, entities: Sequence[Entity]) -> None:
        self._types = {entity.name: entity for entity in entities if entity.meta_type not in ("command", "event")}
        self._commands = {entity.name: entity for entity in entities if entity.meta_type == "command"}

    @property
    def commands(self) -> frozenset[str]:
        """The names of all commands."""
        return frozenset(self._commands)

    def has(self, mark: str) -> bool:
        """Whether the feature mark holds."""
        path, _, flag = mark.partition("#")
        name, *segments = path.split(".")
        command = self._commands.get(name)
        if command is None:
            return False
        if flag:
            return flag in command.features
        return self._reaches(tuple(self._objects(command.arg_type)), segments)

    def _reaches(self, objects: tuple[Entity, ...], segments: Sequence[str]) -> bool:
        for position, segment in enumerate(segments):
            name, _, value = segment.partition("=")
            if value and position == len(segments) - 1:
                return any(value in self._values(kind) for entity in objects for kind in self._member_types(entity, name))
            objects = tuple(self._branches(objects, name, value) if value else self._children(objects, name))
            if not objects:
                return False
        return True

    def _children(self, objects: tuple[Entity, ...], name: str) -> Iterator[Entity]:
        for entity in objects:
            for kind in self._member_types(entity, name):
                yield from self._objects(kind)

    def _branches(self, objects: tuple[Entity, ...], tag: str, value: str) -> Iterator[Entity]:
        for entity in objects:
            for variant in entity.variants:
                if (entity.tag, variant.case) == (tag, value):
                    yield from self._objects(variant.type)

    def _member_types(self, entity: Entity, name: str) -> Iterator[str]:
        """The types of the members of this name, in the object itself and in every branch of it."""
        for member in entity.members:
            if member.name == name:
                yield member.type
        for variant in entity.variants:
            branch = self._types.get(variant.type)
            if branch is not None:
                yield from self._member_types(branch, name)

    def _objects(self, kind: str | None) -> Iterator[Entity]:
        """What a type is made of, through arrays and alternates: objects, and the scalars that end a path."""
        entity = None if kind is None else self._types.get(kind)
        if entity is None:
            return
        if entity.element_type is not None:
            yield from self._objects(entity.element_type)
        elif entity.meta_type == "alternate":
            for member in entity.members:
                yield from self._objects(member.type)
        else:
            yield entity

    def _values(self, kind: str) -> frozenset[str]:
        """The values of an enumeration: `members` since QEMU 6.2, the deprecated `values` before."""
        entity = self._types.get(kind)
        if entity is None:
            return frozenset()
        return frozenset(member.name for member in entity.members) | frozenset(entity.values)


def features(schema: Schema) -> frozenset[str]:
    """Those of FEATURE_MARKS that this emulator has."""
    return frozenset(mark for mark in FEATURE_MARKS if schema.has(mark))
