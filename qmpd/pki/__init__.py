"""The trust between daemons and their remote users: a small CA, the certificates it issues, and the check of a set-up."""

from __future__ import annotations

import socket
from typing import Final

#: Long enough not to be renewed in a hurry, short enough that a lost key is not lost for ever.
CERTIFICATE_DAYS: Final = 397
#: How long an invitation can be used: long enough to walk to the other host.
INVITED_MINUTES: Final = 60.0
#: The organization in everything that is issued.
ORGANIZATION: Final = "qmpd"
#: The directory, in an authority's own, where what it issues is put by default.
ISSUED: Final = "issued"


def own_hosts() -> tuple[str, ...]:
    """What this host calls itself. Blocks: a resolver may be asked."""
    return tuple(dict.fromkeys((socket.gethostname(), socket.getfqdn())))
