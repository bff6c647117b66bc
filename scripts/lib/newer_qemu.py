"""A newer Debian's QEMU, unpacked beside the installed one: nothing is installed, root is not needed, `DIR/bin` goes in front of PATH.

APT works in a root of its own under DIR. Its mirror is the one this system's sources name for the release it runs, with the same proxy
settings; Debian's archive keyring decides what is trusted. The programs are told (patchelf) to use the dynamic linker and the libraries
that they were built for, which lie beside them: so a process's executable is the emulator. What starts them says where firmware and
modules are, which they would look for in the installed system.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

from scripts.lib.apt import SetupError
from scripts.lib.progress import say, step
from scripts.lib.sources import archives

SUITES: Final = ("trixie", "trixie-backports")
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: The OpenGL and Spice modules are never used, but a QEMU without its own would try the installed ones of the other version, and complain.
PACKAGES: Final = (
    "qemu-system-arm",
    "qemu-system-mips",
    "qemu-system-misc",
    "qemu-system-modules-opengl",
    "qemu-system-modules-spice",
    "qemu-system-ppc",
    "qemu-system-riscv",
    "qemu-system-s390x",
    "qemu-system-sparc",
    "qemu-system-x86",
    "qemu-utils",
    "patchelf",
)
DATA_DIRECTORIES: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
PROOF: Final = "qemu-system-x86_64"


def unpack(directory: Path, suite: str) -> None:
    """Leave a working QEMU of `suite` in `directory`/bin; quick when it is there already. Raises SetupError; a failure leaves no stamp."""
    stamp = directory / "suite"
    if not (stamp.exists() and stamp.read_text(encoding="utf-8") == suite):
        _claim(directory)
        with step(f"fetching {suite}'s QEMU packages"):
            archives = _fetch(directory, suite)
        with step(f"unpacking {len(archives)} packages into {directory / 'root'}"):
            _extract(archives, directory / "root")
        with step("adapting its programs"):
            _adapt(directory)
        shutil.rmtree(directory / "apt")
        _version(directory)
        stamp.write_text(suite, encoding="utf-8")
    say(_version(directory))
    say(f"setup: put it first with  PATH={shlex.quote(str(directory / 'bin'))}:$PATH")


def _claim(directory: Path) -> None:
    """Empty `directory` of an earlier attempt. One that holds anything else is somebody's and stays as it is."""
    ours = {"apt", "bin", "root", "suite", ".gitignore"}
    if directory.exists():
        strange = sorted(entry.name for entry in directory.iterdir() if entry.name not in ours)
        if strange:
            raise SetupError(f"{directory} is not empty ({', '.join(strange[:3])}): name a new directory")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / ".gitignore").write_text("*\n", encoding="utf-8")


def _fetch(directory: Path, suite: str) -> list[Path]:
    private = directory / "apt"
    for path in ("lists/partial", "cache/archives/partial"):
        (private / path).mkdir(parents=True)
    # An empty dpkg status: every library comes along, whatever the host has.
    (private / "status").touch()
    if not KEYRING.exists():
        raise SetupError(f"{KEYRING} is missing: apt-get install --no-install-recommends debian-archive-keyring")
    configuration = private / "apt.conf"
    configuration.write_text(_configuration(private), encoding="utf-8")
    apt_get = ["apt-get", "-q", "-c", str(configuration)]
    _update(apt_get, private / "private.sources", " ".join(dict.fromkeys((SUITES[0], suite))))
    if not _run([*apt_get, "install", "-y", "--download-only", "--no-install-recommends", "-t", suite, *PACKAGES]):
        raise SetupError("apt-get could not fetch them; what it said is above")
    return sorted((private / "cache/archives").glob("*.deb"))


def _update(apt_get: list[str], sources: Path, suites: str) -> None:
    """Fetch the package lists from the first of this system's archives that has `suites` under Debian's signature."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    for mirror in archives(codename):
        sources.write_text(f"Types: deb\nURIs: {mirror}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n", encoding="utf-8")
        if _run([*apt_get, "update"]):
            return
    raise SetupError(f"none of this system's package sources for {codename or 'this release'}/main has {suites} as well")


def _configuration(private: Path) -> str:
    """Read after the system's own files, whose proxy settings stand and whose hooks (they would refresh the system's caches) do not."""
    return "\n".join(
        (
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            "#clear DPkg;",
            f'Dir::Etc::sourcelist "{private / "private.sources"}";',
            'Dir::Etc::sourceparts "/dev/null";',
            'Dir::Etc::preferences "/dev/null";',
            'Dir::Etc::preferencesparts "/dev/null";',
            f'Dir::State "{private}";',
            f'Dir::State::lists "{private / "lists"}";',
            f'Dir::State::status "{private / "status"}";',
            f'Dir::State::extended_states "{private / "extended_states"}";',
            f'Dir::Cache "{private / "cache"}";',
            # Without root there is nobody else to be; with root the download user may not reach DIR.
            'APT::Sandbox::User "";',
            "",
        )
    )


def _extract(archives: list[Path], root: Path) -> None:
    for archive in archives:
        if not _run(["dpkg-deb", "-x", str(archive), str(root)]):
            raise SetupError(f"{archive.name} could not be unpacked; is the disk full?")


def _adapt(directory: Path) -> None:
    root = directory / "root"
    library, linker = _one(root, "usr/lib/*/libc.so.6").parent, _one(root, "usr/lib*/ld-linux*.so.*", "lib*/ld-linux*.so.*")
    # It is one of them itself, and changed by nobody.
    patchelf = [str(linker), "--library-path", str(library), str(root / "usr/bin/patchelf")]
    data = [word for name in DATA_DIRECTORIES if (root / name).is_dir() for word in ("-L", str(root / name))]
    (directory / "bin").mkdir()
    for program in sorted((root / "usr/bin").glob("qemu-*")):
        if not program.is_symlink():
            # Not a run path: that would not hold for the libraries of libraries, and for modules.
            wanted = ["--set-interpreter", str(linker), "--force-rpath", "--set-rpath", str(library)]
            if not _run([*patchelf, *wanted, str(program)]):
                raise SetupError(f"{program.name} could not be adapted; what patchelf said is above")
        words = [str(program.resolve()), *(data if program.name.startswith("qemu-system-") else [])]
        start = directory / "bin" / program.name
        start.write_text(
            "#!/bin/sh\n# Made by scripts/setup --newer-qemu.\n"
            f"export QEMU_MODULE_DIR={shlex.quote(str(library / 'qemu'))}\n"
            f'exec {shlex.join(words)} "$@"\n',
            encoding="utf-8",
        )
        start.chmod(0o755)


def _one(root: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            return path
    raise SetupError(f"the packages hold no {patterns[0]}: cannot run programs of another Debian on {platform.machine()}")


def _version(directory: Path) -> str:
    command = [str(directory / "bin" / PROOF), "--version"]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SetupError(f"{PROOF} of {directory} does not run: {answer.stderr.strip()}")
    return answer.stdout.splitlines()[0]


def _run(command: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, env=environment, check=False).returncode == 0
    except FileNotFoundError as error:
        raise SetupError(f"there is no {command[0]} here: a newer QEMU can be unpacked on Debian only") from error
