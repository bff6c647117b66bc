"""Makes the test guests: `python -m tests.guests.build OUTDIR`, or `build_all(out)` from Python.

A guest is made again only when something it is made from has changed: its source, the included files, its recipe, or this package.
Several processes may build into the same directory: one builds, the others wait and find the work done.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.guests import encoders
from tests.guests.catalogue import SOURCE_DIRECTORY, Assembled, Guest, Program, Recipe, Toolchain, load, recipes

__all__ = ["PACKAGES", "BuildFailed", "Guest", "MissingTools", "build_all"]

_CATALOGUE = load()
PACKAGES: tuple[str, ...] = tuple(sorted({toolchain.package for toolchain in _CATALOGUE.toolchains.values()}))
"""The Debian packages whose assemblers and linkers the guests need."""

TOOL_TIMEOUT_S = 60
"""A tool takes milliseconds; a minute is a host in trouble."""

# AHCI and virtio disks are tried by the firmware from 1 MiB on; drives know a floppy by its size. The upper half of the disk is the ring
# of the block writer.
_IMAGE_BYTES = {"disk": 1024 * 1024, "floppy": 1440 * 1024}


class BuildFailed(Exception):
    """A tool refused a guest; the message has its output."""


class MissingTools(BuildFailed):
    """Assemblers are missing; the message names the Debian packages that have them."""


def build_all(out: Path, only: Collection[str] | None = None) -> dict[str, Guest]:
    """Make every guest of the catalogue in `out`, or those called `only`, and return them by name, `file` absolute.

    Raises:
        MissingTools: an assembler is not installed; nothing was built.
        BuildFailed: a tool refused a source.
    """
    wanted = [recipe for recipe in recipes(_CATALOGUE) if only is None or recipe.guest.name in only]
    _require_tools([recipe.program for recipe in wanted])
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        return {recipe.guest.name: _up_to_date(recipe, out) for recipe in wanted}


def _require_tools(programs: Iterable[Program]) -> None:
    used = {program.toolchain for program in programs if isinstance(program, Assembled)}
    missing = {
        toolchain.prefix + tool: toolchain.package
        for name, toolchain in _CATALOGUE.toolchains.items()
        if name in used
        for tool in ("as", "ld", "objcopy")
        if shutil.which(toolchain.prefix + tool) is None
    }
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise MissingTools(f"not on PATH: {', '.join(sorted(missing))}; on Debian: apt-get install {packages}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _up_to_date(recipe: Recipe, out: Path) -> Guest:
    guest = msgspec.structs.replace(recipe.guest, file=out / recipe.guest.file)
    key = _key(recipe)
    key_file = guest.file.with_name(f"{guest.file.name}.key")
    if not (guest.file.exists() and key_file.exists() and key_file.read_text() == key):
        with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as scratch:
            fresh = Path(scratch) / "guest"
            fresh.write_bytes(_image(recipe, Path(scratch)))
            fresh.replace(guest.file)
        key_file.write_text(key)
    return guest


def _key(recipe: Recipe) -> str:
    """Changes whenever the file would: everything a guest is made from, digested."""
    made_from = [Path(__file__)]
    if isinstance(recipe.program, Assembled):
        made_from += [SOURCE_DIRECTORY / recipe.program.source, *sorted(SOURCE_DIRECTORY.glob("*.inc"))]
        toolchain = _CATALOGUE.toolchains[recipe.program.toolchain]
    else:
        made_from += [Path(encoders.__file__)]
        toolchain = None
    digest = hashlib.sha256(msgspec.json.encode((recipe, toolchain), enc_hook=str, order="deterministic"))
    for part in made_from:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def _image(recipe: Recipe, scratch: Path) -> bytes:
    banner = recipe.guest.banner.encode() + b"\r\n"
    if isinstance(recipe.program, Assembled):
        toolchain = _CATALOGUE.toolchains[recipe.program.toolchain]
        image = _assembled(recipe.program, toolchain, recipe.guest.banner, scratch)
    else:
        image = encoders.encoded(recipe.program.target, banner, recipe.program.symbols["DELAY"])
    return image.ljust(_IMAGE_BYTES.get(recipe.guest.how, 0), b"\0")


def _assembled(program: Assembled, toolchain: Toolchain, banner: str, scratch: Path) -> bytes:
    (scratch / "banner.inc").write_text(f'banner:\n\t.asciz "{banner}\\r\\n"\n')
    symbols = [word for name, value in program.symbols.items() for word in ("--defsym", f"{name}={value:#x}")]
    source = SOURCE_DIRECTORY / program.source
    objects, linked, flat = scratch / "guest.o", scratch / "guest.elf", scratch / "guest.bin"
    includes = ["-I", str(scratch), "-I", str(SOURCE_DIRECTORY)]
    _run(toolchain.prefix + "as", *toolchain.assembler, *includes, *symbols, "-o", str(objects), str(source))
    placed = ["-N", f"-Ttext={program.address}", "-e", "_start", "--build-id=none"]
    _run(toolchain.prefix + "ld", *toolchain.linker, *placed, "-o", str(linked), str(objects))
    if program.form == "elf":
        return linked.read_bytes()
    _run(toolchain.prefix + "objcopy", "-O", "binary", "-j", ".text", str(linked), str(flat))
    return flat.read_bytes()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guests.build", description="Make the bare-metal test guests.")
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="where the guests go")
    out: Path = parser.parse_args().out
    try:
        guests = build_all(out)
    except BuildFailed as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    for guest in guests.values():
        sys.stdout.write(f"{guest.name}: {guest.file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
