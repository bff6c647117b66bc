"""The API of a daemon: everywhere its settings say, and on the sockets that systemd passed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from qmpd_api.application import create
from qmpd_api.server import answering, answering_remotely, passed_sockets, serve

if TYPE_CHECKING:
    from qmpd.service import Service
    from qmpd.settings import Settings
    from qmpd.trust import Trust


@asynccontextmanager
async def offered(service: Service, settings: Settings, trust: Trust | None) -> AsyncIterator[None]:
    """Answers for `service` while the block runs, over TLS too where there is `trust`.

    Raises:
        AlreadyExists, HostError, Invalid: it cannot listen; see `serve` and `answering_remotely`.
    """
    app = create(service, names=trust.names if trust is not None else ())
    passed = passed_sockets(os.environ, os.getpid())
    async with AsyncExitStack() as stack:
        listening = answering(app, passed) if passed else serve(app, settings.socket, group=settings.socket_group)
        await stack.enter_async_context(listening)
        if trust is not None:
            await stack.enter_async_context(answering_remotely(app, trust, settings.listen))
        service.serving.set()
        yield
