"""Where a daemon keeps its things, and what an administrator may change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.errors import Invalid
from qmpd.settings import Settings, SettingsFile, check, config_path, merged, system_defaults, user_defaults

HOME = "/home/ada"


def test_the_daemon_of_a_host_is_where_an_administrator_looks_for_it() -> None:
    settings = system_defaults()
    assert (settings.socket, settings.state_dir) == ("/run/qmpd/qmpd.sock", "/var/lib/qmpd")
    assert not settings.raw_options
    assert "/" not in settings.pools


def test_the_daemon_of_a_user_stays_in_the_users_own_places() -> None:
    settings = user_defaults("ada", HOME, {})
    assert {settings.state_dir, settings.cache_dir} == {f"{HOME}/.local/state/qmpd", f"{HOME}/.cache/qmpd"}
    assert settings.socket == f"{HOME}/.cache/qmpd/run/qmpd/qmpd.sock"
    assert settings.qmp_users == ("ada",)


def test_the_daemon_of_a_user_follows_the_environment() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c", "XDG_CONFIG_HOME": "/f"}
    settings = user_defaults("ada", HOME, environ)
    assert (settings.socket, settings.run_dir) == ("/run/user/7/qmpd/qmpd.sock", "/run/user/7/qmpd")
    assert (settings.state_dir, settings.cache_dir) == ("/s/qmpd", "/c/qmpd")
    assert config_path(HOME, environ, system=False) == "/f/qmpd/qmpd.toml"


def test_the_configuration_is_looked_for_where_its_owner_keeps_it() -> None:
    assert config_path("/root", {"XDG_CONFIG_HOME": "/f"}, system=True) == "/etc/qmpd/qmpd.toml"
    assert config_path(HOME, {}, system=False) == f"{HOME}/.config/qmpd/qmpd.toml"
    assert config_path(HOME, {"XDG_CONFIG_HOME": ""}, system=False) == f"{HOME}/.config/qmpd/qmpd.toml"


def test_everything_that_can_be_set_can_be_set_in_the_file() -> None:
    assert set(SettingsFile.__struct_fields__) == set(Settings.__struct_fields__)
    assert merged(system_defaults(), SettingsFile()) == system_defaults()


@given(st.sets(st.sampled_from(SettingsFile.__struct_fields__)))
def test_what_is_set_replaces_the_default_and_nothing_else(names: set[str]) -> None:
    changed = msgspec.to_builtins(user_defaults("ada", HOME, {}))
    file = msgspec.convert({name: changed[name] for name in names if changed[name] is not None}, SettingsFile)
    settings = merged(system_defaults(), file)
    for name in Settings.__struct_fields__:
        if name == "socket" and "run_dir" in names and "socket" not in names:
            assert settings.socket == f"{settings.run_dir}/qmpd.sock"
            continue
        source = user_defaults("ada", HOME, {}) if name in names and changed[name] is not None else system_defaults()
        assert getattr(settings, name) == getattr(source, name)


@pytest.mark.parametrize(
    "wrong",
    [{"nonsense": 1}, {"socket": "relative"}, {"events_kept": 1}, {"parallel_starts": 0}, {"console_log_mib": "16"}, {"pools": "/"}],
)
def test_a_file_with_a_mistake_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, SettingsFile)


def named(**changes: object) -> Settings:
    return merged(user_defaults("ada", HOME, {}), msgspec.convert(changes, SettingsFile))


PEER = {"name": "b", "url": "https://b.example:8443"}


def test_a_peer_is_what_the_file_says_and_otherwise_may_send_and_receive() -> None:
    (peer,) = named(peers=[PEER]).peers
    assert (peer.owner, peer.address, peer.host, peer.may_send, peer.may_receive) == ("b", "b.example:8443", "b.example", True, True)
    (peer,) = named(peers=[{**PEER, "url": "https://[fd00::1]:1", "certificate": "b.example", "may_send": False}]).peers
    assert (peer.owner, peer.address, peer.host, peer.may_send, peer.may_receive) == ("b.example", "[fd00::1]:1", "fd00::1", False, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "B"},
        {"name": "a.b"},
        {"name": "../b"},
        {"name": "b\n"},
        {"url": "http://b:1"},
        {"url": "https://b"},
        {"url": "https://b:1/"},
        {"url": "https://b:1\n"},
        {"url": "https://u@b:1"},
        {"certificate": "a,OU=admin"},
        {"certificate": "a_b"},
        {"migration_address": "b:1 "},
        {"may_send": "yes"},
        {"color": "red"},
    ],
    ids=str,
)
def test_a_peer_that_cannot_be_one_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        named(peers=[{**PEER, **wrong}])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peers": [PEER, PEER]}, "another peer has the name 'b'"),
        ({"peers": [PEER, {**PEER, "name": "c", "certificate": "b"}]}, "another peer has the certificate 'b'"),
        ({"peers": [{**PEER, "url": "https://b:0"}]}, "ports are from 1"),
        ({"peers": [{**PEER, "url": "https://b:65536"}]}, "ports are from 1"),
        ({"migration_ports": "2000-1000"}, "the lower first"),
        ({"migration_ports": "0-10"}, "the lower first"),
        ({"migration_ports": "60000-65536"}, "the lower first"),
    ],
)
def test_what_cannot_be_right_together_is_said(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(Invalid, match=problem):
        check(named(**changes))


def test_machines_of_peers_are_awaited_where_the_api_is_unless_something_else_is_said() -> None:
    check(named())
    assert (named().migration_host, named().migration_port_range) == ("127.0.0.1", range(49152, 49216))
    assert named(listen=["[fd00::1]:8443", "192.0.2.1:1"]).migration_host == "fd00::1"
    assert named(listen=["192.0.2.1:1"], migration_listen="192.0.2.2").migration_host == "192.0.2.2"
    assert named(migration_ports="7-7").migration_port_range == range(7, 8)


def test_false_and_empty_are_settings_too() -> None:
    settings = merged(user_defaults("ada", HOME, {}), SettingsFile(raw_options=False, qmp_users=()))
    assert (settings.raw_options, settings.qmp_users) == (False, ())


def test_a_socket_that_was_not_set_moves_with_the_run_directory() -> None:
    assert merged(system_defaults(), SettingsFile(run_dir="/run/lab")).socket == "/run/lab/qmpd.sock"
    assert merged(system_defaults(), SettingsFile(run_dir="/run/lab", socket="/run/s")).socket == "/run/s"
