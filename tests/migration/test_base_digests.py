"""Whether two hosts have the same base is found out by reading it once, and nobody learns more of a host's files by asking."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import CannotMove, NotYet
from qmpd.migration import bases
from qmpd.migration.bases import Bases
from qmpd.migration.protocol import BaseOffer
from qmpd.spec import BaseImage
from qmpd.tasks import background

MIB = 1024 * 1024


def offered(path: Path, digest: str) -> BaseOffer:
    return BaseOffer(path=str(path), format="raw", size=path.stat().st_size, digest=digest)


async def test_a_base_is_read_once_by_all_daemons_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = tmp_path / "base.raw", tmp_path / "cache"
    base.write_bytes(random.Random(1).randbytes(3 * MIB))
    async with background() as tasks:
        ours = Bases(tasks, (str(tmp_path),), str(cache))
        first = await ours.offered(BaseImage(path=str(base), format="raw"), None)
        assert (first.path, first.size) == (str(base), 3 * MIB)
        # What the file says is believed, for that file alone, and as long as nobody has changed it.
        kept = cache / bases.FILE
        kept.write_bytes(kept.read_bytes().replace(first.digest[-8:].encode(), b"deadbeef"))
        theirs = Bases(tasks, (str(tmp_path),), str(cache))
        assert (await theirs.offered(BaseImage(path=str(base), format="raw"), "/x")).digest.endswith("deadbeef")
        assert not (await theirs.found(first)).same
        assert (await ours.found(first)).same
        await ours.check([first])
        with base.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(CannotMove, match="changed"):
            await ours.check([first])
        monkeypatch.setattr(bases, "PATIENCE_S", 0.0)
        with pytest.raises(NotYet):
            await ours.found(first)
        monkeypatch.setattr(bases, "PATIENCE_S", None)
        assert (await ours.found(first)).why == "it has other contents"


async def test_a_peer_learns_nothing_of_what_is_no_base_here(tmp_path: Path) -> None:
    pool, outside = tmp_path / "pool", tmp_path / "outside"
    pool.mkdir()
    for path in (pool / "long", outside):
        path.write_bytes(bytes(MIB))
    async with background() as tasks:
        ours = Bases(tasks, (str(pool),), str(tmp_path / "cache"))
        found = {
            path: await ours.found(msgspec.structs.replace(offered(outside, "x"), path=str(path), size=7))
            for path in (
                pool / "long",
                outside,
                pool / "none",
                pool,
            )
        }
    assert not any(base.same for base in found.values())
    assert [base.why.partition(" ")[0] for base in found.values()] == ["it", "outside", "there", "it"]
