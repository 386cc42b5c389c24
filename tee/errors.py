"""What keeps a verdict about a boot from being reached, by name. A boot that differs is a verdict, not an error.

CannotVerify
├── NeedsRoot              the event log and the boot partition are root's
├── NoTPM                  no TPM, or none with a SHA-256 bank
├── NoEventLog             the firmware or the kernel gives none
├── InvalidEventLog        truncated, contradictory, too big, or no event log at all
├── InvalidPCRs            a file of PCR values that is none
├── NoMeasurements         nothing is published for what was booted, or it cannot be found
└── InvalidMeasurements    not of format 1, incomplete, or contradicting itself
    └── BadSignature       not signed, or not by the release key
"""

from __future__ import annotations

from ai_assistant.errors import AIAssistantError


class CannotVerify(AIAssistantError):
    http_status = 422


class NeedsRoot(CannotVerify):
    http_status = 403


class NoTPM(CannotVerify):
    http_status = 501


class NoEventLog(CannotVerify):
    http_status = 501


class InvalidEventLog(CannotVerify):
    pass


class InvalidPCRs(CannotVerify):
    pass


class NoMeasurements(CannotVerify):
    http_status = 404


class InvalidMeasurements(CannotVerify):
    pass


class BadSignature(InvalidMeasurements):
    pass
