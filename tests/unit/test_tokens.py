"""Tokens: made once, stored as hashes, good for their role and labels until they end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.access import RIGHTS, ROLES, Caller, Personal, Right, Role, check_right, in_scope
from qmpd.database import open_database
from qmpd.errors import Forbidden, Invalid, NotFound, Unauthorized
from qmpd.sqlite import SqliteStore, open_store
from qmpd.tokens import PREFIX, Tokens
from qmpd.views import NewToken, TokenRequest

NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with open_database(tmp_path / "s") as database, open_store(database) as opened:
        yield opened


def ask(name: str = "robot", role: Personal = "operator", days: float | None = 1.0, **labels: str) -> TokenRequest:
    return TokenRequest(name=name, role=role, labels=labels, days=days)


async def made(tokens: Tokens, request: TokenRequest | None = None) -> NewToken:
    return await tokens.create(request or ask())


async def test_who_shows_a_token_has_its_role_and_labels(store: SqliteStore) -> None:
    tokens = Tokens(store)
    new = await made(tokens, ask(role="viewer", team="lab"))
    caller = tokens.caller(new.token, "192.0.2.1")
    assert (caller.user, caller.role, caller.labels, caller.address) == ("token:robot", "viewer", {"team": "lab"}, "192.0.2.1")
    assert tokens.list()[0].last_used_at is not None


async def test_only_a_hash_is_stored_and_nothing_says_the_secret(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = Tokens(store)
    new = await made(tokens)
    secret = new.token.split("_", 2)[2]
    snapshot = await store.read(PREFIX)
    assert all(secret.encode() not in record.value for record in snapshot.records.values())
    with pytest.raises(Unauthorized) as refused:
        tokens.caller(new.token + "x", None)
    told = caplog.text + str(refused.value) + msgspec.json.encode(tokens.list()).decode()
    assert secret not in told


async def test_another_daemon_knows_the_tokens_of_the_one_before(store: SqliteStore) -> None:
    new = await made(Tokens(store))
    again = Tokens(store)
    with pytest.raises(Unauthorized):
        again.caller(new.token, None)
    await again.load()
    assert again.caller(new.token, None).role == "operator"


async def test_a_damaged_record_opens_no_door_and_closes_no_other(store: SqliteStore) -> None:
    new = await made(Tokens(store))
    await store.commit({PREFIX + "junk": 0}, {PREFIX + "junk": b"\xc1"})
    again = Tokens(store)
    await again.load()
    assert [view.name for view in again.list()] == ["robot"]
    assert again.caller(new.token, None).role == "operator"


async def test_a_token_ends_when_its_time_is_over_and_its_name_is_free_then(store: SqliteStore) -> None:
    clock = Clock()
    tokens = Tokens(store, clock)
    new = await made(tokens)
    with pytest.raises(Invalid, match=r"\$\.name"):
        await made(tokens)
    clock.now = NOW + timedelta(days=1)
    with pytest.raises(Unauthorized):
        tokens.caller(new.token, None)
    assert [view.expired for view in tokens.list()] == [True]
    await made(tokens)
    forever = await made(tokens, ask("forever", days=None))
    clock.now = NOW + timedelta(days=10_000)
    assert tokens.caller(forever.token, None).role == "operator"


async def test_a_revoked_token_is_refused_at_once_and_for_ever(store: SqliteStore) -> None:
    tokens = Tokens(store)
    by_name, by_id = await made(tokens), await made(tokens, ask("other"))
    await tokens.revoke("robot")
    await tokens.revoke(by_id.about.id)
    again = Tokens(store)
    await again.load()
    for known in (tokens, again):
        assert known.list() == ()
        for new in (by_name, by_id):
            with pytest.raises(Unauthorized):
                known.caller(new.token, None)
    with pytest.raises(NotFound):
        await tokens.revoke("robot")


async def test_a_token_that_somebody_else_removed_can_be_revoked(store: SqliteStore) -> None:
    tokens = Tokens(store)
    new = await made(tokens)
    snapshot = await store.read(PREFIX)
    key = PREFIX + new.about.id
    await store.commit({key: snapshot.records[key].revision}, {key: None})
    await tokens.revoke("robot")
    assert tokens.list() == ()


@pytest.mark.parametrize("shown", ["", "qmpd", "qmpd__", "qmpd_a_b", "x_y_z", "_" * 50, "a" * 10_000, "qmpd_\udcff_\udcff", "\0_\0_\0"])
async def test_what_is_no_token_is_refused(store: SqliteStore, shown: str) -> None:
    tokens = Tokens(store)
    await made(tokens)
    with pytest.raises(Unauthorized, match="not valid"):
        tokens.caller(shown, None)


async def test_the_secret_of_one_token_does_not_open_with_the_name_of_another(store: SqliteStore) -> None:
    tokens = Tokens(store)
    one, other = await made(tokens), await made(tokens, ask("other", "admin"))
    mixed = "_".join([*other.token.split("_", 2)[:2], one.token.split("_", 2)[2]])
    with pytest.raises(Unauthorized):
        tokens.caller(mixed, None)


RIGHT_NAMES: tuple[Right, ...] = ("known", "read", "operate", "define", "admin", "peer")


@pytest.mark.parametrize("right", RIGHT_NAMES)
@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_its_rights_and_no_other(role: Role, right: Right) -> None:
    caller = Caller(user="x", role=role, peer="x" if role == "peer" else None)
    if right in RIGHTS[role]:
        check_right(caller, right)
    else:
        with pytest.raises(Forbidden, match=f"is {role}; this is for"):
            check_right(caller, right)


def test_a_peer_whom_nobody_knows_may_do_nothing() -> None:
    with pytest.raises(Forbidden, match="no certificate of a peer"):
        check_right(Caller(user="x", role="peer"), "peer")


def test_no_token_makes_a_peer_and_none_says_more_than_there_is_to_say() -> None:
    for wrong in ({"name": "x", "role": "peer"}, {"name": "x", "role": "viewer", "admin": True}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, TokenRequest)


def test_who_is_unknown_may_do_nothing_but_join() -> None:
    for right in RIGHT_NAMES:
        with pytest.raises(Unauthorized):
            check_right(Caller(), right)
    check_right(Caller(), "join")


LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy"))


@given(LABELS, LABELS)
def test_a_machine_exists_for_those_all_of_whose_labels_it_has(machine: dict[str, str], scope: dict[str, str]) -> None:
    assert in_scope(machine, Caller(labels=scope)) == all(machine.get(key) == value for key, value in scope.items())
