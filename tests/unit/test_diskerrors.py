"""Which disk halted the guest is told from QEMU's event, or from its block layer when the event was missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.diskerrors import found_in, halted_by
from qmpd.resuming import LONGEST_PAUSE_S, LOOK_S, ROOM_BYTES, is_room, pause_after
from qmpd.views import DiskErrorView

EVENT: dict[str, object] = {
    "device": "",
    "node-name": "disk1-image",
    "operation": "write",
    "action": "stop",
    "nospace": True,
    "reason": "No space left on device",
}


def test_an_event_names_the_disk_by_its_place_in_the_definition() -> None:
    assert halted_by(EVENT, "t") == DiskErrorView(
        device="disk1-image", disk=1, operation="write", nospace=True, reason="No space left on device", at="t"
    )


@pytest.mark.parametrize("action", ["report", "ignore"])
def test_an_error_that_halts_nobody_is_none(action: str) -> None:
    assert halted_by({**EVENT, "action": action}, "t") is None


@pytest.mark.parametrize(
    ("names", "disk"),
    [
        ({"device": "disk12", "node-name": "#block100"}, 12),
        ({"device": "", "node-name": "", "qom-path": "/machine/peripheral/disk3/virtio-backend"}, 3),
        ({"device": "mydisk4", "node-name": "other"}, None),
        ({"device": None, "node-name": 7}, None),
    ],
)
def test_a_device_that_is_not_one_of_the_definition_has_no_place(names: dict[str, object], disk: int | None) -> None:
    found = halted_by({**EVENT, **names}, "t")
    assert found is not None
    assert found.disk == disk


def test_the_block_layer_says_which_device_failed() -> None:
    blocks = [
        {"device": "", "qdev": "/machine/peripheral/disk0/virtio-backend", "io-status": "ok"},
        {"device": "", "qdev": "/machine/peripheral/disk1/virtio-backend", "io-status": "nospace"},
        {"device": "", "qdev": "disk2", "io-status": "failed"},
    ]
    found = found_in(blocks, "t")
    assert found is not None
    assert (found.disk, found.nospace, found.operation) == (1, True, None)
    found = found_in(blocks[2:], "t")
    assert found is not None
    assert (found.disk, found.nospace) == (2, False)


@pytest.mark.parametrize("answer", [None, {}, [], [5], [{"io-status": "ok"}], [{"device": "disk0"}]])
def test_an_answer_without_a_failed_device_is_none(answer: object) -> None:
    assert found_in(answer, "t") is None


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_room_is_what_is_free_whatever_the_size(size: int, free: int) -> None:
    assert not is_room(0, size)
    assert is_room(max(free, ROOM_BYTES), size)
    if is_room(free, size):
        assert is_room(free + 1, size)


def test_a_small_file_system_needs_little_room() -> None:
    assert is_room(1 << 20, 16 << 20)
    assert not is_room(1 << 20, 1 << 30)


@given(st.integers(0, 10_000))
def test_a_machine_that_fails_again_and_again_waits_longer_but_not_for_ever(attempts: int) -> None:
    assert LOOK_S <= pause_after(attempts) <= pause_after(attempts + 1) <= LONGEST_PAUSE_S
