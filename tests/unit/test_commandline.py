"""What a QEMU's command line says of its monitors, and what of it must not be told."""

from __future__ import annotations

import pytest

from qmpd.commandline import MonitorPlace, fields, options, qmp_places
from qmpd.redaction import HIDDEN, redacted

QEMU = "qemu-system-x86_64"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-qmp", "unix:/run/q,server=on,wait=off"], MonitorPlace(path="/run/q")),
        (["-qmp", "unix:q,server,nowait"], MonitorPlace(path="/home/q")),
        (["--qmp", "unix:a,,b"], MonitorPlace(path="/home/a,b")),
        (["-qmp-pretty", "unix:/q"], MonitorPlace(path="/q")),
        (["-chardev", "socket,id=m,path=/q,server=on", "-mon", "chardev=m,mode=control"], MonitorPlace(path="/q")),
        (["-mon", "m,mode=control", "-chardev", "socket,id=m,path=/q"], MonitorPlace(path="/q")),
        (["-chardev", "socket,id=m,path=/q", "-qmp", "chardev:m"], MonitorPlace(path="/q")),
        (["-qmp", "tcp:localhost:4444,server=on"], MonitorPlace(described="tcp:localhost:4444")),
        (["-qmp", "stdio"], MonitorPlace(described="stdio")),
        (["-qmp", "chardev:gone"], MonitorPlace(described="the unknown chardev gone")),
        (["-chardev", "socket,id=m,fd=3,server=on", "-qmp", "chardev:m"], MonitorPlace(described="an inherited socket")),
        (["-chardev", "socket,id=m,host=::1,port=1", "-qmp", "chardev:m"], MonitorPlace(described="TCP ::1:1")),
        (["-chardev", "socket,id=m,path=q,abstract=on", "-qmp", "chardev:m"], MonitorPlace(described="the abstract socket q")),
    ],
)
def test_a_qmp_monitor_is_found(words: list[str], expected: MonitorPlace) -> None:
    assert qmp_places([QEMU, "-S", "-name", "-qmp", *words], "/home") == [expected]


def test_a_human_monitor_is_none() -> None:
    given = [QEMU, "-monitor", "unix:/q,server=on", "-mon", "chardev=m,mode=readline", "-chardev", "socket,id=m,path=/q"]
    assert qmp_places(given, "/") == []


def test_options_are_told_from_their_values() -> None:
    given = [QEMU, "-S", "-name", "-S", "disk.img", "--uuid", "u", "-daemonize", "-m"]
    assert list(options(given)) == [("S", ""), ("name", "-S"), ("hda", "disk.img"), ("uuid", "u"), ("daemonize", ""), ("m", "")]


def test_keys_are_told_from_the_first_word() -> None:
    assert fields("socket,id=a,path=x,,y,server") == ("socket", {"id": "a", "path": "x,y"})
    assert fields("id=a,b=") == ("", {"id": "a", "b": ""})


@pytest.mark.parametrize(
    "word",
    [
        "secret,id=s,data={}",
        "secret,data={},id=s",
        "secret,id=s,data={},,and,,more",
        '{{"qom-type":"secret","id":"s","data":"{}"}}',
        '{{"driver":"ssh", "password" : "{}"}}',
        "file=nbd://me:{}@host/x",
        "port=1,password={}",
        "name=opt/com.coreos/config,string={}",
        "type=11,value=io.systemd.credential:root={}",
        "type=11,value=io.systemd.credential.binary:root={}",
        "quiet systemd.set_credential=root:{}",
    ],
)
def test_a_secret_is_taken_out(word: str) -> None:
    told = redacted([word.format("hunter2")])[0]
    assert "hunter2" not in told
    assert HIDDEN in told
    assert redacted([told]) == (told,)


@pytest.mark.parametrize(
    "word",
    [
        "-object",
        "secret,id=s,file=/x",
        "unix:/x,password=on",
        "file=/data=1/x.img",
        "value=io.systemd",
        "http://h/x@y",
        '{"a": "data"}',
        "",
    ],
)
def test_what_is_no_secret_stays(word: str) -> None:
    assert redacted([word]) == (word,)
