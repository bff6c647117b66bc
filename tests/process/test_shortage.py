from __future__ import annotations

import errno

import pytest

from qmpd.errors import Busy, NoSpace, QmpdError
from qmpd.shortage import shortage


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EMFILE, Busy),
        (errno.ENFILE, Busy),
        (errno.EAGAIN, Busy),
        (errno.ENOMEM, Busy),
    ],
)
def test_what_the_host_is_out_of_is_told_by_kind(code: int, meaning: type[QmpdError]) -> None:
    error = shortage(OSError(code, "words"))
    assert type(error) is meaning
    assert error.details == {"errno": errno.errorcode[code]}


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "words"), OSError("no number")])
def test_any_other_error_is_no_shortage(error: OSError) -> None:
    assert shortage(error) is None
