"""Feature marks are answered from QEMU's own schema."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.schema import FEATURE_MARKS, Entity, Schema, features

#: A small schema with everything that a path can lead through.
ENTRIES: list[dict[str, object]] = [
    {"name": "netdev_add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "1", "meta-type": "object", "tag": "type", "members": [{"name": "id", "type": "str"}, {"name": "type", "type": "2"}],
     "variants": [{"case": "stream", "type": "3"}, {"case": "user", "type": "4"}, {"case": "lost", "type": "404"}]},
    {"name": "2", "meta-type": "enum", "members": [{"name": "stream"}, {"name": "user"}]},
    {"name": "3", "meta-type": "object", "members": [{"name": "reconnect-ms", "type": "int"}]},
    {"name": "4", "meta-type": "object", "members": [{"name": "restrict", "type": "bool"}]},
    {"name": "migrate", "meta-type": "command", "arg-type": "5", "ret-type": "0"},
    {"name": "5", "meta-type": "object", "members": [{"name": "channels", "type": "[6]"}, {"name": "node", "type": "8"}]},
    {"name": "[6]", "meta-type": "array", "element-type": "6"},
    {"name": "6", "meta-type": "object", "members": [{"name": "addr", "type": "7"}]},
    {"name": "7", "meta-type": "object", "members": [{"name": "transport", "type": "9"}]},
    {"name": "8", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "3"}]},
    {"name": "9", "meta-type": "enum", "values": ["file", "socket"]},
    {"name": "device_add", "meta-type": "command", "arg-type": "4", "ret-type": "0", "features": ["json-cli"]},
    {"name": "query-status", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
    {"name": "0", "meta-type": "object", "members": []},
    {"name": "RESET", "meta-type": "event", "arg-type": "0"},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
    {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
]  # fmt: skip


@pytest.fixture
def schema() -> Schema:
    """The small schema."""
    return Schema(msgspec.convert(ENTRIES, list[Entity]))


def test_commands_are_those_of_the_schema(schema: Schema) -> None:
    assert schema.commands == {"netdev_add", "migrate", "device_add", "query-status"}


@pytest.mark.parametrize(
    "mark",
    [
        "netdev_add",
        "netdev_add.id",
        "netdev_add.type=stream",
        "netdev_add.type=stream.reconnect-ms",
        "netdev_add.reconnect-ms",
        "migrate.channels",
        "migrate.channels.addr.transport=file",
        "migrate.node.reconnect-ms",
        "device_add#json-cli",
    ],
)
def test_a_mark_holds(schema: Schema, mark: str) -> None:
    assert schema.has(mark)


@pytest.mark.parametrize(
    "mark",
    [
        "blockdev-add",
        "RESET",
        "netdev_add.type=passt",
        "netdev_add.type=user.reconnect-ms",
        "netdev_add.type=lost.reconnect-ms",
        "netdev_add.id.more",
        "migrate.channels.addr.transport=rdma",
        "migrate.detach",
        "query-status.anything",
        "device_add#json-cli-hotplug",
        "netdev_add.id=stream",
    ],
)
def test_a_mark_does_not_hold(schema: Schema, mark: str) -> None:
    assert not schema.has(mark)


def test_only_known_marks_are_features(schema: Schema) -> None:
    assert features(schema) == {
        "netdev_add.type=stream",
        "netdev_add.type=stream.reconnect-ms",
        "netdev_add.type=user",
        "migrate.channels",
        "migrate.channels.addr.transport=file",
        "device_add#json-cli",
    }


def test_an_empty_schema_has_no_features() -> None:
    assert features(Schema([])) == frozenset()


def test_no_mark_is_listed_twice() -> None:
    assert len(set(FEATURE_MARKS)) == len(FEATURE_MARKS)


@given(st.sets(st.sampled_from([str(entry["name"]) for entry in ENTRIES])), st.sampled_from(FEATURE_MARKS))
def test_a_schema_with_holes_has_no_more_features_than_the_whole(missing: set[str], mark: str) -> None:
    whole = Schema(msgspec.convert(ENTRIES, list[Entity]))
    holed = Schema(msgspec.convert([entry for entry in ENTRIES if entry["name"] not in missing], list[Entity]))
    assert whole.has(mark) or not holed.has(mark)
