"""The mark of a machine that was given up while its process may still live: its files stay, and nobody takes their place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import HostError
from qmpd.record import Definition
from qmpd.shortage import shortage

#: It holds the definition, for whoever wants to create the machine anew.
MARK: Final = "forgotten.json"


def mark_forgotten(state_dir: str, definition: Definition) -> None:
    """Marks the files of a machine that is about to be forgotten. Blocks.

    Raises:
        NoSpace, HostError: the mark cannot be made; the machine must not be forgotten then.
    """
    target = Path(state_dir) / MARK
    temporary = target.with_suffix(".new")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(definition.spec)))
        temporary.rename(target)
    except OSError as error:
        raise shortage(error) or HostError(f"{target} cannot be written: {error.strerror}") from error


def is_forgotten(state_dir: str) -> bool:
    """Whether these are the files of a machine that was forgotten. Blocks."""
    return (Path(state_dir) / MARK).exists()
