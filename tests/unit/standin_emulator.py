"""A program that answers like an emulator with `-machine none`, as far as a probe asks; it says how often it was started."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAM = """\
import json, os, sys
starts, answers, behaviour = {starts!r}, {answers!r}, {behaviour!r}
with open(starts, "a") as file:
    file.write(str(os.getpid()) + "\\n")
if behaviour == "dies":
    sys.exit("qemu-system-toy: \\x1b[31mno such luck")
if behaviour == "babbles":
    print("Welcome!")
if behaviour == "mute":
    sys.stdin.read()
    import signal
    signal.pause()
version = {{"qemu": {{"major": 9, "minor": 8, "micro": 7}}, "package": ""}}
print(json.dumps({{"QMP": {{"version": version, "capabilities": []}}}}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["execute"]
    if behaviour == "quits" and name == "query-machines":
        sys.exit(3)
    print(json.dumps({{"event": "RTC_CHANGE", "data": {{}}, "timestamp": {{"seconds": 0, "microseconds": 0}}}}))
    if name in answers:
        print(json.dumps({{"return": answers[name]}}), flush=True)
    else:
        print(json.dumps({{"error": {{"class": "CommandNotFound", "desc": "The command " + name + " has not been found"}}}}), flush=True)
"""

ANSWERS: Mapping[str, object] = {
    "qmp_capabilities": {},
    "query-target": {"arch": "toy"},
    "query-machines": [
        {"name": "none", "cpu-max": 1, "numa-mem-supported": False, "hotpluggable-cpus": False, "deprecated": False},
        {"name": "board-1.0", "alias": "board", "cpu-max": 4, "default-cpu-type": "toy-cpu", "default-ram-id": "ram", "deprecated": True},
    ],
    "query-qmp-schema": [
        {"name": "screendump", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
        {"name": "1", "meta-type": "object", "members": [{"name": "format", "type": "2"}]},
        {"name": "2", "meta-type": "enum", "members": [{"name": "ppm"}, {"name": "png"}], "values": ["ppm", "png"]},
    ],
    "qom-list-types": [{"name": "tcg-accel"}, {"name": "qtest-accel"}],
    "query-command-line-options": [{"option": "sandbox", "parameters": []}, {"option": "", "parameters": []}],
}


def make(path: Path, behaviour: str = "answers", answers: Mapping[str, object] = ANSWERS) -> Path:
    """An executable at `path`. Its starts, one pid per line, are counted in the file `starts` beside it."""
    program = PROGRAM.format(starts=str(path.parent / "starts"), answers=json.loads(json.dumps(answers)), behaviour=behaviour)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return path


def starts(directory: Path) -> list[int]:
    """The pids of the stand-ins in this directory that were ever started."""
    log = directory / "starts"
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []
