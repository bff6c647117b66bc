"""A support bundle of a daemon in which secrets lie wherever one can put them: it has everything in it but those."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import tarfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qmpctl.exits import Exit
from qmpd import bundle, logs
from qmpd.access import Caller
from qmpd.errors import QmpdError
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import Kernel, MachineSpec
from qmpd.views import ExpectRequest, QmpRequest, ShutdownRequest
from qmpd_api.application import create
from qmpd_api.server import serve
from tests.api.qmpctl_process import Piped, between_pipes
from tests.guests.build import Guest
from tests.machines import spec_of

pytestmark = pytest.mark.qemu

#: What must not be found anywhere. Every place has one of its own, so that a failure says which.
PLANTED = "Tr0ub4dor"
ANYBODY = Caller(user="somebody")


def planted(place: str) -> str:
    return f"{PLANTED}-{place}"


def full_of_secrets(guest: Guest) -> MachineSpec:
    """A definition with secrets in every field that takes free text."""
    spec = spec_of(guest, "one")
    assert spec.kernel is not None
    kernel = Kernel(
        image=spec.kernel.image,
        console=False,
        append=f"quiet rd.luks.passphrase={planted('append')} systemd.set_credential=db:{planted('credential')} "
        f"ds=https://user:{planted('url')}@example.org/seed root_password='{planted('quoted')} and more'",
    )
    return msgspec.structs.replace(
        spec,
        title=f"the one with password={planted('title')}",
        kernel=kernel,
        labels={"api-token": planted("label"), "note": f"login: me, password: {planted('note')}", "role": "database"},
        extra_args=(
            *("-object", f"secret,id=s0,data={planted('object')}"),
            *("-object", json.dumps({"qom-type": "secret", "id": "s1", "data": planted("json-object")})),
            *("-fw_cfg", f"name=opt/org.example/token,string={planted('fw-cfg')}"),
            *("-smbios", f"type=11,value=io.systemd.credential:db={planted('smbios')}"),
        ),
    )


def names(directory: Path) -> list[str]:
    """What is in a directory."""
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
async def socket(service: Service, settings: Settings) -> AsyncIterator[Path]:
    async with serve(create(service), settings.socket):
        yield Path(settings.socket)


@pytest.fixture
def qmpctl(socket: Path) -> Piped:
    return partial(between_pipes, socket)


def read(data: bytes) -> dict[str, str]:
    """The files of a bundle by their names, and nothing may be odd about them."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            assert (member.mode, member.name.startswith("qmpd-bundle-")) == (0o600, True)
            found[member.name.partition("/")[2]] = file.read().decode()
    return found


async def bundled(service: Service) -> dict[str, str]:
    return read(b"".join([piece async for piece in service.upkeep.bundle(service.version())]))


@pytest.fixture
async def told(
    service: Service, settings: Settings, guests: dict[str, Guest], qmpctl: Piped, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> dict[str, str]:
    """What is in the bundle of a daemon full of secrets, as qmpctl wrote it."""
    caplog.set_level(logging.INFO)
    root, recent = logging.getLogger(), logs.Recent()
    root.addHandler(recent)
    try:
        view = await service.create(full_of_secrets(guests["x86_64-q35-quiet"]), start=True)
        banner = ExpectRequest(pattern=guests["x86_64-q35-quiet"].banner, from_start=True, timeout_s=60)
        assert (await service.expect("one", banner)).matched
        assert service.machine("one").console_line
        logging.getLogger("qmpd.test").warning(
            "failed", extra={"error": f"no access with token={planted('log')}", "password": planted("field")}
        )
        with (Path(settings.state_dir) / "machines" / "one" / "stderr.log").open("a") as stderr:
            stderr.write(f"qemu: cannot log in, password: {planted('stderr')}\n-----BEGIN PRIVATE KEY-----\n{planted('pem')}\n")
        service.bus.publish("qmp", "one", {"event": "TEST", "data": {"auth": planted("event"), "text": f"secret={planted('event-text')}"}})
        await service.console("one", None).write(f"password={planted('typed')}\n".encode())
        job = await service.shutdown("one", ShutdownRequest(timeout_s=0.01))
        while (await service.job(job.id)).state == "running":
            await asyncio.sleep(0.01)
        with pytest.raises(QmpdError):
            await service.qmp("one", QmpRequest(execute="query-block", arguments={"password": planted("qmp")}), ANYBODY)
        target = tmp_path / "bundle.tar.gz"
        code, out, err = await qmpctl("bundle", str(target))
        assert (code, err) == (Exit.OK, b"")
        assert str(target.stat().st_size).encode() in out
        assert target.stat().st_mode & 0o777 == 0o600
        assert names(tmp_path) == ["bundle.tar.gz"]
        assert view.name == "one"
        return read(target.read_bytes())
    finally:
        root.removeHandler(recent)


async def test_everything_is_in_it_but_secrets_and_what_guests_print(told: dict[str, str], guests: dict[str, Guest]) -> None:
    assert {name: text[max(0, text.find(PLANTED) - 80) :][:160] for name, text in told.items() if PLANTED in text} == {}
    assert not {name for name, text in told.items() if guests["x86_64-q35-quiet"].banner in text}
    assert set(told) >= {
        *("README.txt", "versions.json", "settings.json", "doctor.json", "check.json", "emulators.json", "machines.json", "jobs.json"),
        *("events.jsonl", "log.txt", "metrics.txt", "missing.txt"),
        *(f"machines/one/{name}" for name in ("definition.json", "launch.json", "stderr.txt")),
    }
    assert told["missing.txt"] == ""
    definition = json.loads(told["machines/one/definition.json"])["spec"]
    assert definition["labels"]["role"] == "database"
    assert definition["kernel"]["append"].startswith("quiet rd.luks.passphrase=*** systemd.set_credential=***")
    launch = json.loads(told["machines/one/launch.json"])
    assert "-nodefaults" in launch["argv"]
    assert json.loads(told["versions.json"])["daemon"]["version"]
    assert json.loads(told["machines.json"])[0]["console_line"] == ""
    events = [json.loads(line) for line in told["events.jsonl"].splitlines()]
    assert {"machine.created", "machine.state", "qmp"} <= {event["kind"] for event in events}
    assert json.loads(told["jobs.json"])[0]["kind"] == "shutdown"
    assert "failed" in told["log.txt"]
    assert "qemu: cannot log in, password: ***" in told["machines/one/stderr.txt"]
    assert 'qmpd_machine_state{machine="one",state="running"} 1.0' in told["metrics.txt"]
    assert json.loads(told["check.json"])["lines"]
    assert json.loads(told["settings.json"])["log_format"] == "auto"


async def test_what_is_too_large_or_cannot_be_had_is_said(
    service: Service, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one"))
    monkeypatch.setattr(bundle, "MEMBER_BYTES", 1000)
    monkeypatch.setattr(bundle, "MEMBER_DEADLINE_S", 0.2)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(service.journal, "last", never)
    files = await bundled(service)
    assert "metrics.txt" not in files
    assert {line.partition(":")[0] for line in files["missing.txt"].splitlines()} >= {"metrics.txt", "events.jsonl"}
    assert "bytes are too many" in files["missing.txt"]
    assert "README.txt" in files


async def test_a_bundle_that_breaks_off_leaves_no_file(qmpctl: Piped, tmp_path: Path) -> None:
    code, _, err = await qmpctl("bundle", str(tmp_path / "no" / "bundle.tar.gz"))
    assert (code, b"No such file" in err) == (Exit.OTHER, True)
    (tmp_path / "taken").mkdir()
    code, _, err = await qmpctl("bundle", str(tmp_path / "taken" / ".." / "taken"))
    assert code == Exit.USAGE
    assert names(tmp_path) == ["taken"]


async def test_doctor_says_what_is_wrong_and_exits_by_it(
    qmpctl: Piped, service: Service, settings: Settings, guests: dict[str, Guest]
) -> None:
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one"))
    (Path(settings.state_dir) / "machines" / "left\x1b[2J").mkdir(parents=True)
    code, out, _ = await qmpctl("doctor", "--json")
    report = json.loads(out)
    assert (code == Exit.OK) is report["ok"]
    assert report["machines"] == 1
    code, out, _ = await qmpctl("doctor")
    text = out.decode()
    assert "note" in text
    assert "left\\x1b[2J: no machine has this directory\n      > look into it" in text
    assert text.splitlines()[-1].startswith("1 machine: ")
