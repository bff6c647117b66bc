"""Command lines of QEMU without their secrets, for people to read.

Known imperfection: a secret can hide in any word. What is taken out is every value that QEMU's options are documented to take a
secret in, and passwords in URLs; a guest's own kernel command line stays, but for systemd's credentials.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

#: What stands in place of a secret.
HIDDEN: Final = "***"

#: Keys of key=value options; `password=on` of VNC and SPICE is a switch. A doubled comma is a comma in a value.
_PAIRS: Final = re.compile(r"((?:^|,)(?:data|password|passphrase|passwd|key|cookie|string)=)(?!(?:on|off)(?:,|$))((?:[^,]|,,)*)")
#: The same in the JSON form of -object, -blockdev and -device.
_JSON: Final = re.compile(r'("(?:data|password|passphrase|passwd|key|cookie|string)"\s*:\s*)"(?:[^"\\]|\\.)*"')
_URL: Final = re.compile(r"(\w://[^/\s:@,]*:)[^/\s@,]+(?=@)")
_CREDENTIAL: Final = re.compile(r"((?:io\.systemd\.credential(?:\.binary)?|systemd\.set_credential(?:_binary)?)[:=][^=:\s,]*[=:])[^\s,]+")


def redacted(argv: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line, with every value that may be a secret replaced by `HIDDEN`."""
    return tuple(_word(word) for word in argv)


def _word(word: str) -> str:
    word = _JSON.sub(rf'\1"{HIDDEN}"', word) if word.lstrip().startswith("{") else _PAIRS.sub(rf"\g<1>{HIDDEN}", word)
    return _CREDENTIAL.sub(rf"\g<1>{HIDDEN}", _URL.sub(rf"\g<1>{HIDDEN}", word))
