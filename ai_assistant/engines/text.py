"""From a token's bytes to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Utf8Decoder:
    """Bytes to text as they come; a character that is not complete yet waits, a broken one becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class StopMatcher:
    """Lets text through up to the first stop string, however it is cut into pieces.

    Only what may still become a stop string is held back, so most text passes at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now. After a stop string was seen, `stopped` is true and nothing more comes."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(each) for each in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._may_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _may_become_stop(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(each.startswith(tail) for each in self._stops):
                return length
        return 0

    def finish(self) -> str:
        """What was held back, when the model ends without completing a stop string."""
        rest, self._held = self._held, ""
        return "" if self.stopped else rest
