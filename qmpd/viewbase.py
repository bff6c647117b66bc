"""The bases of what goes over the API: answers and requests."""

from __future__ import annotations

import msgspec


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the answers. Unknown fields are ignored when read, so that an older client can talk to a newer daemon."""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the request bodies other than MachineSpec."""
