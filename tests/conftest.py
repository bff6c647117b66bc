"""Fixtures every part of the tests shares: a daemon of its own in a short directory, and the built guests."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypotheses

from qmpd.daemon import running
from qmpd.lifecycle import AT_REST
from qmpd.service import Service
from qmpd.settings import Settings, user_defaults
from tests.guests.build import Guest, MissingTools, build_all
from tests.unavailable import unavailable

ROOT = Path(__file__).parent.parent
# A shell that starts a job in the background has it ignore SIGINT, and so would every process that the tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the host is, and nothing about what is tested.
hypotheses.register_profile(
    "patient", hypotheses(), deadline=None, suppress_health_check=[*hypotheses().suppress_health_check, HealthCheck.too_slow]
)
hypotheses.load_profile("patient")

#: Built once and kept between runs; a guest is made again only when its source changes.
GUESTS = ROOT / ".cache" / "guests"
#: What emulators said of themselves is the same for all tests.
CACHE = ROOT / ".cache" / "facts"


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for socket paths, which tmp_path does not."""
    path = Path(tempfile.mkdtemp(prefix="q"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def settings(short_directory: Path) -> Settings:
    """The settings of a daemon that has nothing but its own directory."""
    defaults = user_defaults("tester", str(short_directory), {})
    return msgspec.structs.replace(
        defaults,
        socket=f"{short_directory}/api.sock",
        state_dir=f"{short_directory}/s",
        run_dir=f"{short_directory}/r",
        cache_dir=str(CACHE),
        qmp_users=(),
    )


@pytest.fixture
async def service(settings: Settings, request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    """A daemon without its API. Its machines are killed at the end; a failing test shows what they said."""
    async with running(settings, {}) as made:
        yield made
        await end_machines(made)


async def end_machines(service: Service) -> None:
    """Kills every process of this daemon."""
    for view in service.machines({}, None).machines:
        if view.state not in AT_REST:
            await service.kill(view.name)


@pytest.fixture(scope="session")
def guests() -> dict[str, Guest]:
    """Our own bare-metal guests, built, by name."""
    try:
        return build_all(GUESTS)
    except MissingTools as error:
        unavailable(error)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failing test with a daemon prints its machines' last words."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's result object is not typed here
    directory = getattr(item, "funcargs", {}).get("short_directory")
    if report.failed and isinstance(directory, Path):
        for log in sorted(directory.glob("s/machines/*/*.log")):
            report.sections.append((f"{log.parent.name}/{log.name}", log.read_bytes()[-2048:].decode("utf-8", "replace")))
