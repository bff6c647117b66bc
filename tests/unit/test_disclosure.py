"""What is told to others has no secrets in it, and everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.disclosure import is_secret, told, told_text
from qmpd.redaction import HIDDEN

PLANTED = "hunter2"


@pytest.mark.parametrize(
    "name",
    [
        *("password", "DB_PASSWORD", "luks-passphrase", "apiKey", "APIKey", "api.key", "token", "accessTokenId", "auth", "psk", "wpa_psk"),
        *("--secret", "client_secret", "sshPrivateKey", "Authorization", "PIN", "session-cookie", "credentials"),
    ],
)
def test_a_name_says_that_its_value_is_a_secret(name: str) -> None:
    assert is_secret(name)
    assert told({name: PLANTED}) == {name: HIDDEN}
    assert told({name: {"nested": PLANTED}}) == {name: HIDDEN}


@pytest.mark.parametrize("name", ["", "machine", "keyboard", "keys", "author", "pinned", "passthrough", "bypass-all", "console", "monkey"])
def test_other_names_say_nothing(name: str) -> None:
    assert not is_secret(name)
    assert told({name: "value"}) == {name: "value"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("console=ttyS0 password=hunter2 quiet", "console=ttyS0 password=*** quiet"),
        ("systemd.set_credential=db:hunter2", "systemd.set_credential=***"),
        ("a=b,password=hunter2,c=d", "a=b,password=***"),
        ('event error="no token=hunter2"', 'event error="no token=***'),
        ("token = hunter2", "token = ***"),
        ("password: hunter2 and more of it\nnext line", "password: ***\nnext line"),
        ("Authorization: Bearer hunter2", "Authorization: ***"),
        ('{"password": "hunter2", "port": 1}', '{"password":"***","port":1}'),
        ('see {"password": "hunter2", "port": 1}', 'see {"password": ***'),
        ('secret="two words hunter2" next', "secret=*** next"),
        ("key='two words hunter2' next", "key=*** next"),
        ("curl --token hunter2 --verbose", "curl --token *** --verbose"),
        ("https://me:hunter2@example.org/x", "https://***@example.org/x"),
        ("https://hunter2@example.org", "https://***@example.org"),
        ("secret,id=s0,data=hunter2,format=raw", "secret,id=s0,data=***,format=raw"),
        ("-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----\nnext", "***\nnext"),
        ("-----BEGIN PRIVATE KEY-----\nhunter2", "***"),
        ("vnc=unix:/x,password=on", "vnc=unix:/x,password=on"),
        ("password=", "password=***"),
        ("[not json", "[not json"),
        ("nothing at all", "nothing at all"),
    ],
)
def test_a_text_is_told_without_its_secrets(text: str, shown: str) -> None:
    assert told_text(text) == shown


def test_documents_are_told_without_their_secrets() -> None:
    document = {
        "labels": {"api-token": PLANTED, "role": f"db password={PLANTED}"},
        "argv": ["qemu", "-object", f"secret,id=s,data={PLANTED}", "--password", PLANTED, "--token", "-x", "--key=a", "left"],
        "object": {"qom-type": "secret", "id": "s", "data": PLANTED},
        "event": {"data": {"password": True, "token": None, "port": 5900, "ratio": 0.5}},
        f"password={PLANTED}": 1,
    }
    assert told(document) == {
        "labels": {"api-token": HIDDEN, "role": f"db password={HIDDEN}"},
        "argv": ["qemu", "-object", f"secret,id=s,data={HIDDEN}", "--password", HIDDEN, "--token", "-x", f"--key={HIDDEN}", "left"],
        "object": {"qom-type": "secret", "id": "s", "data": HIDDEN},
        "event": {"data": {"password": True, "token": None, "port": 5900, "ratio": 0.5}},
        f"password={HIDDEN}": HIDDEN,
    }


def test_what_is_too_deep_is_not_told() -> None:
    deep: object = PLANTED
    for _ in range(1000):
        deep = [deep]
    assert PLANTED not in str(told(deep))
    assert PLANTED not in told_text("[" * 100_000 + f"password={PLANTED}")


@given(st.text(alphabet="ab=:,. \"'{}[]-\n", max_size=200))
def test_a_text_with_no_secret_stays_readable(text: str) -> None:
    if not text.lstrip().startswith(("{", "[")):
        assert told_text(text) == text


@given(
    st.text(max_size=50), st.sampled_from(["password", "API_TOKEN", "x.secret"]), st.sampled_from(["=", ": ", " = "]), st.text(max_size=50)
)
def test_a_named_secret_is_never_told(before: str, name: str, sign: str, after: str) -> None:
    assert "Tr0ub4dor" not in told_text(f"{before} {name}{sign}Tr0ub4dor {after}")


def test_long_texts_are_read_once() -> None:
    assert told_text("a" * 100_000) == "a" * 100_000
    assert told_text("a=" * 50_000) == "a=" * 50_000
    assert told_text("a " * 50_000) == "a " * 50_000
