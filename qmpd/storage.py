"""Files of definitions and of machines: what a path leads to, and the images and copies a machine needs before it starts."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qmpd.errors import AlreadyExists, HostError, NoSpace, QmpdError
from qmpd.facts import FileFacts
from qmpd.failpoint import failpoint
from qmpd.plan import BlankImage, Copy, LaunchPlan
from qmpd.runlock import LOCK_NAMES
from qmpd.spec import BiosFirmware, ImageDisk, MachineSpec, PflashFirmware

#: Never a source of images or kernels, whatever the pools say.
NEVER: Final = ("/proc", "/sys", "/dev")
#: `qemu-img create` only writes a header; longer than this means that the file system hangs.
CREATE_DEADLINE_S: Final = 60.0
#: Enough of a file for every header looked at.
HEADER_BYTES: Final = 4096
QCOW2: Final = b"QFI\xfb"
MAGICS: Final = {
    QCOW2: "qcow2",
    b"KDMV": "vmdk",
    b"# Disk D": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"\x7fELF": "elf",
    b"LUKS\xba\xbe": "luks",
}
#: Lies in the directory of a machine while its definition is being stored, replaced or deleted.
UNFINISHED: Final = ".unfinished"
#: Names of files in one message.
SHOWN_NAMES: Final = 5
#: qcow2 header (docs/interop/qcow2.txt): offsets of backing_file_offset, size, crypt_method and incompatible_features.
BACKING_OFFSET: Final = 8
BACKING_LENGTH: Final = 16
VIRTUAL_SIZE: Final = 24
CRYPT_METHOD: Final = 32
INCOMPATIBLE: Final = 72
EXTERNAL_DATA: Final = 1 << 2
CORRUPT: Final = 1 << 1

_BACKED: Final = (
    "the image refers to a backing file, which could be any file of this host: name it as the disk's base, or flatten the image with "
    "qemu-img convert"
)
#: As QEMU tells a protocol from a path (block.c).
_PROTOCOL: Final = re.compile(r"[^/]*:")

_log = logging.getLogger(__name__)


def paths_of(spec: MachineSpec) -> tuple[str, ...]:
    """Every path a definition names."""
    images = [disk for disk in spec.disks if isinstance(disk, ImageDisk)]
    found: list[str | None] = [disk.path for disk in images]
    found += [layer.path for disk in images if disk.base is not None for layer in disk.base.layers()]
    if spec.kernel is not None:
        found += [spec.kernel.image, spec.kernel.initrd, spec.kernel.dtb]
    if isinstance(spec.firmware, BiosFirmware):
        found.append(spec.firmware.path)
    elif isinstance(spec.firmware, PflashFirmware):
        found += [spec.firmware.code, spec.firmware.vars]
    return tuple(dict.fromkeys(path for path in found if path is not None))


def examine(paths: Iterable[str], pools: Sequence[str]) -> dict[str, FileFacts]:
    """What each path leads to. Blocks; nothing but regular files is ever opened, so no FIFO or device is touched."""
    roots = [os.path.realpath(pool) for pool in pools]  # a pool may be a link to where there is room
    return {path: _examine(path, pools, roots) for path in paths}


def _examine(path: str, pools: Sequence[str], roots: Sequence[str]) -> FileFacts:
    real = os.path.realpath(path)
    if any(real == root or real.startswith(f"{root}/") for root in NEVER):
        return FileFacts(kind="special", real_path=real, refusal="files of /proc, /sys and /dev cannot be used")
    if not any(root == "/" or real == root or real.startswith(f"{root}/") for root in roots):
        return FileFacts(kind="denied", real_path=real, refusal=f"outside the directories this daemon may use ({', '.join(pools)})")
    try:
        status = Path(real).stat()
    except PermissionError:
        return FileFacts(kind="denied", real_path=real)
    except (OSError, ValueError):
        return FileFacts(kind="missing", real_path=real)
    if stat.S_ISDIR(status.st_mode):
        return FileFacts(kind="directory", real_path=real)
    if not stat.S_ISREG(status.st_mode):
        return FileFacts(kind="special", real_path=real)
    readable = os.access(real, os.R_OK)
    header = _header(real) if readable else b""
    refusal = _refusal(header)
    named = backing_name(header) if refusal is None else None
    return FileFacts(
        kind="file",
        size=status.st_size,
        readable=readable,
        writable=os.access(real, os.W_OK),
        real_path=real,
        magic=next((name for magic, name in MAGICS.items() if header.startswith(magic)), None),
        refusal=refusal if named is None else _BACKED,
        backing=_resolved(path, named) if named else None,
    )


def _resolved(path: str, named: str) -> str | None:
    """Where the name of a base leads to from an image; None where that could not be said to anybody."""
    backing = os.path.realpath(Path(path).parent / named)
    return backing if backing.isprintable() else None


def _header(path: str) -> bytes:
    try:
        # Between stat and open a file may have become something that blocks: O_NONBLOCK makes that harmless.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.read(descriptor, HEADER_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return b""


def guest_bytes(path: str, image_format: str) -> int:
    """How large the disk is that a guest sees in an image: what its header says, or its length. Blocks. Raises OSError."""
    header = _header(path) if image_format == "qcow2" else b""
    if header.startswith(QCOW2):
        return int.from_bytes(header[VIRTUAL_SIZE : VIRTUAL_SIZE + 8], "big")
    return Path(path).stat().st_size


def backing_at(image: str, path: str) -> str | None:
    """Where what an image says it was made upon would lead, were the image at `path`. None: nowhere. Blocks."""
    named = backing_name(_header(image))
    return _resolved(path, named) if named else None


def backing_elsewhere(image: str, path: str) -> str | None:
    """The same on another host: no link of this one is followed. None: nowhere. Blocks."""
    named = backing_name(_header(image))
    return os.path.normpath(Path(path).parent / named) if named else None


def _refusal(header: bytes) -> str | None:
    """Why a qcow2 image cannot be used: everything in it that would make QEMU open another file but for its base, or a repair be due."""
    if not header.startswith(QCOW2):
        return None
    header = header.ljust(HEADER_BYTES, b"\0")  # QEMU reads zeros behind the end of a file, and takes a header that is cut off
    if int.from_bytes(header[CRYPT_METHOD : CRYPT_METHOD + 4], "big"):
        return "the image is encrypted, and qmpd has no key for it"
    version = int.from_bytes(header[4:8], "big")
    features = int.from_bytes(header[INCOMPATIBLE : INCOMPATIBLE + 8], "big") if version >= 3 else 0
    if features & EXTERNAL_DATA:
        return "the image keeps its data in another file; convert it with qemu-img convert"
    if features & CORRUPT:
        return "the image is marked corrupt; look at it with qemu-img check"
    return None


def backing_name(header: bytes) -> str | None:
    """What a qcow2 header says the image was made upon; `""` for what is no plain path. None: upon nothing."""
    if not header.startswith(QCOW2):
        return None
    header = header.ljust(HEADER_BYTES, b"\0")
    start = int.from_bytes(header[BACKING_OFFSET : BACKING_OFFSET + 8], "big")
    length = int.from_bytes(header[BACKING_LENGTH : BACKING_LENGTH + 4], "big")
    if start == 0:
        return None
    name = os.fsdecode(header[start : start + length])
    plain = length > 0 and start + length <= HEADER_BYTES and name.isprintable() and not _PROTOCOL.match(name)
    return name if plain else ""


async def make(blank: Sequence[BlankImage], copies: Sequence[Copy]) -> None:
    """Makes the images and copies that are not there yet.

    Raises:
        NoSpace: the file system is full; what was begun is removed.
        HostError: `qemu-img` is missing or failed.
    """
    for image in blank:
        await asyncio.to_thread(_make_image, image)
    for copy in copies:
        await asyncio.to_thread(_copy, copy)


async def furnish(plan: LaunchPlan) -> None:
    """Makes everything of the machine's own that is not there yet. Raises as `make`."""
    await make(plan.blank_images, plan.copies)
    if plan.tpm is not None:
        await asyncio.to_thread(make_directory, plan.tpm.directory)


def make_directory(path: str) -> None:
    """Makes a directory of a machine's own, unless it is there. Blocks. Raises NoSpace, HostError."""
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(error, Path(path)) from error


def claim(path: str) -> None:
    """Takes a name for an image that is to be made there (`replace`), so that it can be nobody else's. Blocks.

    Raises:
        AlreadyExists: there is a file.
        NoSpace, HostError: it cannot be made.
    """
    target = Path(path)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.touch(mode=0o600, exist_ok=False)
    except FileExistsError as error:
        raise AlreadyExists(f"{target} exists", path=path) from error
    except OSError as error:
        raise _storage_error(error, target) from error


def replace(image: BlankImage) -> None:
    """Makes an image, whatever is there. Blocks. Raises as `make`."""
    target = Path(image.path)
    with _making(target) as temporary:
        if image.format == "raw":
            with temporary.open("wb") as file:
                file.truncate(image.size_bytes)
        else:
            # -u: of the layers below, each of which was examined, none is opened, so no header is followed.
            below = () if image.base is None else ("-u", "-b", image.base.path, "-F", image.base.format)
            _qemu_img("create", "-q", "-f", image.format, *below, str(temporary), str(image.size_bytes))


def _make_image(image: BlankImage) -> None:
    if not Path(image.path).exists():
        replace(image)


def _qemu_img(*words: str) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        raise HostError("qemu-img is not installed, and a qcow2 image has to be made (package qemu-utils)")
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=CREATE_DEADLINE_S, check=False, errors="replace")
    except subprocess.TimeoutExpired as error:
        raise HostError(f"qemu-img {words[0]} did not end within {CREATE_DEADLINE_S:.0f} s") from error
    if done.returncode != 0 and "No space left" in done.stderr:
        raise NoSpace(f"qemu-img {words[0]}: {done.stderr.strip()}")
    if done.returncode != 0:
        raise HostError(f"qemu-img {words[0]} failed: {done.stderr.strip()}")


def _copy(copy: Copy) -> None:
    target = Path(copy.target)
    if target.exists():
        return
    with _making(target) as temporary:
        shutil.copyfile(copy.source, temporary)


def draft_of(target: Path) -> Path:
    """Where an image is while it is made: what a daemon leaves there that is killed meanwhile is removed with the image."""
    return target.with_name(f".{target.name}.new")


@contextmanager
def _making(target: Path) -> Iterator[Path]:
    """A name beside the target for what is being made: it becomes the target when it is whole, or is removed."""
    temporary = draft_of(target)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            failpoint("image-make")
            yield temporary
            failpoint("image-made")
            temporary.rename(target)
            failpoint("image-named")
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _storage_error(error, target) from error


def _storage_error(error: OSError, target: Path) -> QmpdError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return NoSpace(f"{target}: {error.strerror}")
    return HostError(f"{target}: {error.strerror or error}")


def mark_unfinished(directory: str) -> None:
    """Makes a machine's own directory, marked: what is in there that no stored definition names is nobody's. Blocks.

    The mark is there before the files of a machine that is created or changed, and before the definition of one that is deleted goes; so
    what a daemon leaves that is killed in between can be told from the disks of a machine whose definition was lost.

    Raises:
        NoSpace, HostError: it cannot be made.
    """
    mark = Path(directory) / UNFINISHED
    try:
        failpoint("creation-mark")
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.touch(mode=0o600)
    except OSError as error:
        raise _storage_error(error, mark) from error


def mark_finished(directory: str) -> None:
    """Removes the mark: the definition is stored. Blocks."""
    try:
        failpoint("creation-unmark")
        (Path(directory) / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        # The next daemon finds a definition beside it, and removes it then.
        _log.warning("the mark of an unfinished machine was not removed", extra={"directory": directory, "error": str(error)})


def clear_unfinished(directory: str) -> None:
    """Removes the directory if it is still marked. Blocks. Raises HostError."""
    own = Path(directory)
    if is_unfinished(directory):
        try:
            remove_machine_files(directory)
        except OSError as error:
            raise _storage_error(error, own) from error


def is_unfinished(directory: str) -> bool:
    """Whether the mark is there. Blocks."""
    return (Path(directory) / UNFINISHED).exists()


def unfinished(machines: str) -> list[str]:
    """The directories below `machines` that are marked. Blocks."""
    try:
        return sorted(str(own) for own in Path(machines).iterdir() if is_unfinished(str(own)))
    except FileNotFoundError:
        return []


def settle(directory: str, images: Collection[str]) -> None:
    """Clears up after a change that was not finished: of the images only these stay, and the mark goes. Blocks."""
    for path in (*Path(directory).glob("disk[0-9]*"), *Path(directory).glob(".*.new")):
        if str(path) not in images:
            path.unlink(missing_ok=True)
    mark_finished(directory)


def remove_machine_files(directory: str) -> None:
    """Removes a machine's own directory and all in it, the mark last. Blocks."""
    own = Path(directory)
    if not own.is_dir():
        return
    failpoint("files-remove")
    for entry in own.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != UNFINISHED:
            entry.unlink()
    shutil.rmtree(own)
    failpoint("files-removed")


def make_place(directory: str) -> None:
    """A machine's own directory for a new machine of the name, marked; what an unfinished creation left there is removed. Blocks.

    Raises:
        AlreadyExists: there are files of a machine whose definition was lost: disks, say, that somebody wants back.
        NoSpace, HostError: it cannot be made.
    """
    own = Path(directory)
    try:
        if own.is_dir() and not is_unfinished(directory):
            kept = sorted(entry.name for entry in own.iterdir() if entry.name not in LOCK_NAMES)
            if kept:
                what = ", ".join(kept[:SHOWN_NAMES])
                raise AlreadyExists(
                    f"{own} has files of a machine that is not defined any more ({what}): move them away first", path=str(own)
                )
        remove_machine_files(directory)
    except OSError as error:
        raise _storage_error(error, own) from error
    mark_unfinished(directory)
