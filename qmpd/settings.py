"""The daemon's own configuration: one TOML file, and defaults that depend on whether the daemon belongs to root or to a user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from qmpd.errors import Problem, invalid
from qmpd.spec import Name, Path

LogFormat = Literal["auto", "text", "json"]
#: An address and a port: `192.0.2.1:8443`, `[2001:db8::1]:8443`; names are resolved.
Address = Annotated[str, Meta(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$", max_length=270)]
#: A host by name or address, without brackets.
Host = Annotated[str, Meta(pattern=r"^([0-9A-Fa-f:.]+|[A-Za-z0-9._-]+)\Z", max_length=253)]
#: Where the API of another daemon is.
Url = Annotated[str, Meta(pattern=r"^https://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}\Z", max_length=280)]
#: Who a peer is in its certificate, where that is a host name or an address: TLS can be told to accept that one alone.
Owner = Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z", max_length=64)]
#: The first and the last port of a range.
Ports = Annotated[str, Meta(pattern=r"^[0-9]{1,5}-[0-9]{1,5}\Z")]


#: Of the API, in the run directory.
SOCKET_NAME: Final = "qmpd.sock"
_SCHEME: Final = "https://"
_LOOPBACK: Final = "127.0.0.1"
_MAX_PORT: Final = 65_535


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another daemon, with which machines are exchanged.

    `url` is where its API is. `may_send`: it may send machines to this daemon; `may_receive`: it may get machines of this daemon.
    `certificate` is the name in its certificate, where that is not `name`. `migration_address` is where its machines are sent to,
    where that is not the host in `url`.
    """

    name: Name
    url: Url
    may_send: bool = True
    may_receive: bool = True
    certificate: Owner | None = None
    migration_address: Host | None = None

    @property
    def owner(self) -> str:
        """The name in its certificate."""
        return self.certificate or self.name

    @property
    def address(self) -> str:
        """Its API, as `host:port`."""
        return self.url.removeprefix(_SCHEME)

    @property
    def host(self) -> str:
        """The host of its API, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an administrator may set in `qmpd.toml`. Everything has a default.

    `pools` are the directories from which definitions may name files. `raw_options` allows `extra_args`. `qmp_users` are the
    users who may send any QMP command, by name; everybody else may send those that only read. `pki_dir` holds the certificates
    for the API over TCP and for migration. `log_format` is how the daemon logs:
    `text` or `json`, one event per line on standard error; `auto` is systemd's journal where standard error leads there, else text.
    `machines_cgroup` is a directory of cgroup v2 that was given to the daemon's user; machines with limits get their own in it.
    Without it they become scopes of systemd. `listen` are the addresses where the API is offered over TLS too; a caller there needs a
    token or a certificate. `peers` are the other daemons that machines may be moved to and from. `migration_listen` is the address
    at which machines of peers are awaited (default: the host of the first `listen`, else the loopback), on the ports `migration_ports`;
    not where systemd passes sockets for that.
    `audit_log_mib` is what the audit log may take.
    """

    socket: Path
    state_dir: Path
    run_dir: Path
    cache_dir: Path
    pki_dir: Path
    socket_group: str | None = None
    boards: tuple[Path, ...] = ()
    emulators: tuple[Path, ...] = ()
    pools: tuple[Path, ...] = ("/",)
    raw_options: bool = True
    qmp_users: tuple[str, ...] = ()
    console_log_mib: Annotated[int, Meta(ge=1, le=65_536)] = 16
    events_kept: Annotated[int, Meta(ge=100, le=10_000_000)] = 100_000
    parallel_starts: Annotated[int, Meta(ge=1, le=1024)] = 8
    log_format: LogFormat = "auto"
    machines_cgroup: Path | None = None
    listen: tuple[Address, ...] = ()
    peers: tuple[Peer, ...] = ()
    migration_listen: Host | None = None
    migration_ports: Ports = "49152-49215"
    audit_log_mib: Annotated[int, Meta(ge=1, le=65_536)] = 32

    @property
    def migration_host(self) -> str:
        """Where machines of peers are awaited, without brackets."""
        if self.migration_listen is not None:
            return self.migration_listen
        return self.listen[0].rpartition(":")[0].strip("[]") if self.listen else _LOOPBACK

    @property
    def migration_port_range(self) -> range:
        """The ports on which machines of peers are awaited."""
        return _ports(self.migration_ports)


class SettingsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same as it may stand in a file: everything optional."""

    socket: Path | None = None
    socket_group: str | None = None
    state_dir: Path | None = None
    run_dir: Path | None = None
    cache_dir: Path | None = None
    pki_dir: Path | None = None
    boards: tuple[Path, ...] | None = None
    emulators: tuple[Path, ...] | None = None
    pools: tuple[Path, ...] | None = None
    raw_options: bool | None = None
    qmp_users: tuple[str, ...] | None = None
    console_log_mib: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    events_kept: Annotated[int, Meta(ge=100, le=10_000_000)] | None = None
    parallel_starts: Annotated[int, Meta(ge=1, le=1024)] | None = None
    log_format: LogFormat | None = None
    machines_cgroup: Path | None = None
    listen: tuple[Address, ...] | None = None
    peers: tuple[Peer, ...] | None = None
    migration_listen: Host | None = None
    migration_ports: Ports | None = None
    audit_log_mib: Annotated[int, Meta(ge=1, le=65_536)] | None = None


def system_defaults() -> Settings:
    """The settings of the daemon of a whole host: files only from where an administrator puts images, kernels and firmware."""
    return Settings(
        socket=f"/run/qmpd/{SOCKET_NAME}",
        state_dir="/var/lib/qmpd",
        run_dir="/run/qmpd",
        cache_dir="/var/cache/qmpd",
        pki_dir="/etc/qmpd/pki",
        pools=("/var/lib/qmpd/images", "/srv", "/boot", "/usr/share", "/usr/lib"),
        raw_options=False,
        qmp_users=("root",),
    )


def user_defaults(user: str, home: str, environ: Mapping[str, str]) -> Settings:
    """The settings of one user's daemon: everything that user may open, and any QMP command for that user."""
    runtime = environ.get("XDG_RUNTIME_DIR") or f"{home}/.cache/qmpd/run"
    state = environ.get("XDG_STATE_HOME") or f"{home}/.local/state"
    cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    return Settings(
        socket=f"{runtime}/qmpd/{SOCKET_NAME}",
        state_dir=f"{state}/qmpd",
        run_dir=f"{runtime}/qmpd",
        cache_dir=f"{cache}/qmpd",
        pki_dir=f"{_user_config(home, environ)}/pki",
        qmp_users=(user,),
    )


def config_path(home: str, environ: Mapping[str, str], *, system: bool) -> str:
    """Where the configuration file of the host's daemon or of a user's is looked for."""
    if system:
        return "/etc/qmpd/qmpd.toml"
    return f"{_user_config(home, environ)}/qmpd.toml"


def _user_config(home: str, environ: Mapping[str, str]) -> str:
    return f"{environ.get('XDG_CONFIG_HOME') or home + '/.config'}/qmpd"


def merged(defaults: Settings, changes: SettingsFile) -> Settings:
    """The defaults with what was set. A socket that was not set is in the run directory, wherever that is."""
    given = {name: value for name in SettingsFile.__struct_fields__ if (value := getattr(changes, name)) is not None}
    if "run_dir" in given:
        given.setdefault("socket", f"{given['run_dir']}/{SOCKET_NAME}")
    return msgspec.structs.replace(defaults, **given)


def check(settings: Settings) -> None:
    """Raises Invalid with everything that cannot be right, though each value for itself may be."""
    problems = []
    ports = settings.migration_port_range
    if not 0 < ports.start < ports.stop <= _MAX_PORT + 1:
        problems.append(Problem(path="migration_ports", message=f"must be two ports, the lower first, not {settings.migration_ports}"))
    for what in ("name", "owner"):
        seen: set[str] = set()
        for index, peer in enumerate(settings.peers):
            value: str = getattr(peer, what)
            if value in seen:
                problems.append(Problem(path=f"peers[{index}]", message=f"another peer has the {_SAID[what]} {value!r} as well"))
            seen.add(value)
    problems += [
        Problem(path=f"peers[{index}].url", message=f"ports are from 1 to {_MAX_PORT}")
        for index, peer in enumerate(settings.peers)
        if not 0 < int(peer.address.rpartition(":")[2]) <= _MAX_PORT
    ]
    if problems:
        raise invalid(problems)


_SAID: Final = {"name": "name", "owner": "certificate"}


def _ports(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last) + 1)
