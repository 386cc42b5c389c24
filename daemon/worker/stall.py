"""The end of a worker whose Python does not run any more.

Native code that never returns and regular expressions that never end may keep the interpreter's lock, and
then no Python thread can do anything about it, the one that would notice the daemon's end included. The
timer of `faulthandler` is a native thread that needs no lock: it ends the process unless it is put off.
"""

from __future__ import annotations

import faulthandler
import os
import time

STALL_S = 60.0
_SHARE = 4


class StallTimer:
    """Put off by the thread that reads the connection, for as long as there is work; stopped otherwise.

    That thread also waits while the daemon does not read, so a daemon that stands still for `limit_s` ends its
    busy workers, too. There is one timer per process.
    """

    def __init__(self, limit_s: float = STALL_S) -> None:
        self.limit_s = limit_s
        self.every_s = limit_s / _SHARE
        """How often `keep` must at least be called while there is work."""
        self._until = 0.0
        # The stacks of all threads would fill the journal and help nobody: they hold no native frames.
        self._sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def keep(self, busy: bool) -> None:
        """Put the end off, or take it away. Costs a thread only once in `every_s`."""
        if not busy:
            if self._until:
                faulthandler.cancel_dump_traceback_later()
                self._until = 0.0
            return
        now = time.monotonic()
        if self._until - now < self.limit_s - self.every_s:
            faulthandler.dump_traceback_later(self.limit_s, file=self._sink, exit=True)
            self._until = now + self.limit_s
