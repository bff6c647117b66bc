"""A definition is decoded once, into types that hold only what can be right."""

from __future__ import annotations

import tomllib

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.spec import MEANINGS, MachineSpec, explained
from tests.unit.anything import BOARDS, specs

GOOD: dict[str, object] = {"name": "one", "board": "toy"}


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"name": "One"}, "$.name"),
        ({"name": "one\n"}, "$.name"),
        ({"name": "x" * 64}, "$.name"),
        ({"board": "a b"}, "$.board"),
        ({"uuid": "no"}, "$.uuid"),
        ({"kernel": {"image": "relative"}}, "$.kernel.image"),
        ({"kernel": {"image": "/a\nb"}}, "$.kernel.image"),
        ({"title": "\x1b[2J"}, "$.title"),
        ({"nics": [{"kind": "none", "mac": "52:54:00:AA:00:00"}]}, "$.nics[0].mac"),
        ({"nics": [{"kind": "user", "forwards": [{"guest_port": 1, "host_address": "localhost"}]}]}, "$.nics[0].forwards[0].host_address"),
        ({"emulator": "\n"}, "$.emulator"),
        ({"nonsense": 1}, ""),
        ({"disks": [{"kind": "blank"}]}, "$.disks[0]"),
        ({"disks": [{"kind": "tape"}]}, "$.disks[0].kind"),
        ({"memory_mib": 0}, "$.memory_mib"),
        ({"memory_mib": "64"}, "$.memory_mib"),
        ({"machine_options": {"x": -(2**63) - 1}}, "$.machine_options"),
        ({"machine_options": {"x": 2**63}}, "$.machine_options"),
        ({"cpu": {"features": {"x": 2**64}}}, "$.cpu.features"),
        ({"tpm": {"version": "1.2"}}, "$.tpm.version"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_place_and_in_words(wrong: dict[str, object], where: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert({**GOOD, **wrong}, MachineSpec)
    message = explained(str(refused.value))
    assert where in message
    assert "regex" not in message


def test_every_pattern_has_a_meaning_in_words() -> None:
    for pattern, meaning in MEANINGS.items():
        assert explained(f"Expected `str` matching regex {pattern!r} - at `$.x`") == f"Expected {meaning} - at `$.x`"
    assert explained("anything else") == "anything else"


def test_a_definition_is_the_same_in_every_format() -> None:
    document = {**GOOD, "memory_mib": 64, "disks": [{"kind": "blank", "size_mib": 1}], "labels": {"a": "b"}}
    expected = msgspec.convert(document, MachineSpec)
    toml = 'name = "one"\nboard = "toy"\nmemory_mib = 64\nlabels = { a = "b" }\n[[disks]]\nkind = "blank"\nsize_mib = 1\n'
    assert msgspec.json.decode(msgspec.json.encode(document), type=MachineSpec) == expected
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(document), type=MachineSpec) == expected
    assert msgspec.convert(tomllib.loads(toml), MachineSpec) == expected
    assert msgspec.json.decode(msgspec.json.encode(expected)) == document


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_a_definition_is_stored_as_it_is(data: st.DataObject) -> None:
    spec = msgspec.structs.replace(data.draw(specs(data.draw(st.sampled_from(BOARDS)))), devices=())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=MachineSpec) == spec
