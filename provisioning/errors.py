"""What can be wrong with an image, a disk or the writing of one to the other.

AIAssistantError
├── InvalidArgument
│   ├── InvalidImage         the file is no image of ours, or not all of one
│   └── NotADisk             a partition, a volume, a folder …
├── Busy
│   └── DiskInUse            mounted, swap, part of a volume, or what this system runs from
├── NoSpace
│   └── DiskTooSmall
├── NoSuchDisk
├── DiskFailed               it was removed, is write-protected, or answered with an error
└── VerificationFailed       what was read back is not what was written
"""

from __future__ import annotations

from ai_assistant.errors import AIAssistantError, Busy, InvalidArgument, NoSpace


class InvalidImage(InvalidArgument):
    pass


class NotADisk(InvalidArgument):
    pass


class DiskInUse(Busy):
    pass


class DiskTooSmall(NoSpace):
    pass


class NoSuchDisk(AIAssistantError):
    http_status = 404


class DiskFailed(AIAssistantError):
    pass


class VerificationFailed(AIAssistantError):
    pass
