"""The three kinds of line of a check report, under one topic."""

from __future__ import annotations

import msgspec

from qmpd.views import CheckLine


class Topic(msgspec.Struct, frozen=True):
    """A heading; its methods make lines under it."""

    name: str

    def passed(self, subject: str, found: str, meaning: str = "", *, value: float | None = None) -> CheckLine:
        """Nothing to mend, though `meaning` may name a limit."""
        return CheckLine(topic=self.name, subject=subject, verdict="pass", found=found, meaning=meaning, value=value)

    def warned(self, subject: str, found: str, meaning: str, mend: str | None = None, *, value: float | None = None) -> CheckLine:
        """Machines run, but something is slower or missing: `meaning` says what."""
        return CheckLine(topic=self.name, subject=subject, verdict="warn", found=found, meaning=meaning, mend=mend, value=value)

    def failed(self, subject: str, found: str, meaning: str, mend: str | None = None) -> CheckLine:
        """No machine can run."""
        return CheckLine(topic=self.name, subject=subject, verdict="fail", found=found, meaning=meaning, mend=mend)
