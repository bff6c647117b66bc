"""Where a daemon keeps its things, and what an administrator may change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.settings import Settings, SettingsFile, config_path, merged, system_defaults, user_defaults

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


def test_false_and_empty_are_settings_too() -> None:
    settings = merged(user_defaults("ada", HOME, {}), SettingsFile(raw_options=False, qmp_users=()))
    assert (settings.raw_options, settings.qmp_users) == (False, ())


def test_a_socket_that_was_not_set_moves_with_the_run_directory() -> None:
    assert merged(system_defaults(), SettingsFile(run_dir="/run/lab")).socket == "/run/lab/qmpd.sock"
    assert merged(system_defaults(), SettingsFile(run_dir="/run/lab", socket="/run/s")).socket == "/run/s"
