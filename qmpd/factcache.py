"""Small msgpack files for facts that can be found out again: read as if anybody had written them, written so that a crash leaves
either the old file or the new one.

Known imperfection: two processes that write the same file at once both succeed, and the later one wins. Nothing is lost but time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgpack
import msgspec

from qmpd.failpoint import failpoint

T = TypeVar("T")

#: The facts of all emulators of a distribution take about 0.8 MB; several versions side by side still fit.
MAX_BYTES: Final = 16 * 2**20
#: The deepest cache is file, list, entry, facts, list of machine types, machine type.
MAX_DEPTH: Final = 8
#: A device list has about 550 names; a whole file about 40,000 values.
MAX_VALUES: Final = 1_000_000
MAX_ITEMS: Final = 10_000
MAX_TEXT_BYTES: Final = 64 * 1024


class Damaged(ValueError):
    """The bytes are not a cache file of the wanted type, or are over a limit."""


def decode(data: bytes, kind: type[T]) -> T:
    """The document in `data` as `kind`.

    Raises:
        Damaged: it is too long, too deep, has too many values, a key twice, trailing bytes, an extension type, or another shape.
    """
    if len(data) > MAX_BYTES:
        raise Damaged(f"{len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        tree: object = msgpack.unpackb(
            data,
            strict_map_key=True,
            object_pairs_hook=_without_duplicates,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        _measure(tree)
        return msgspec.convert(tree, kind)
    except (ValueError, msgpack.UnpackException) as error:
        raise Damaged(str(error)) from error


def read(path: Path, kind: type[T]) -> T | None:
    """The cached document, or None where there is none that can be read."""
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_BYTES + 1), kind)
    except (OSError, Damaged):
        return None


def write(path: Path, document: msgspec.Struct) -> None:
    """Replace the file by this document, durably and in one step; makes the directory (0700) if need be.

    Raises:
        OSError: nothing was changed.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data: bytes = msgpack.packb(msgspec.to_builtins(document))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            failpoint("cache-write")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _fsync_directory(path.parent)


def _without_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """A map as a dict, provided that no key occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Damaged("a key occurs twice")
    return result


def _measure(tree: object) -> None:
    """Refuse what is too deep or has too many values; counted without recursion, since the depth is what is in doubt."""
    level: list[object] = [tree]
    values = 0
    for _ in range(MAX_DEPTH):
        values += len(level)
        if values > MAX_VALUES:
            raise Damaged(f"more than {MAX_VALUES} values")
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise Damaged(f"nested more than {MAX_DEPTH} deep")


def _children(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return tuple(value.values())
    return value if isinstance(value, list) else ()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
