"""Words that forbid a change, whatever the model thinks of the rest of the sentence.

A small model may overlook one word, and in "do not reboot" that word is everything. So a proposal that
would change something is dropped when the question forbids it, only asks about it, or speaks of memory
where the model would delete from the disk. It costs a few answers, and never makes one.
"""

from __future__ import annotations

import re

_FORBIDS = re.compile(
    r"\b(?:dont|do not|never|must not|should not|shouldnt|cannot|cant|wont|not to|rather not|instead of)\b"
    r"|不要|不准|不许|切勿|请勿|(?<![特级性区识个告])别(?![的处名])"
)
_ASKS = re.compile(
    r"\b(?:what (?:would|will|happens|if)|why|how (?:do|can|should|to)|should (?:i|we)|shall (?:i|we)|is it (?:safe|ok)"
    r"|did you|have you|has anyone|if (?:i|we|you))\b"
    r"|如果|要是|怎么(?!了)|为什么|该不该|要不要|会不会"
)
# "I do not need it in memory any more" asks for what it seems to forbid.
_DISMISSES = re.compile(r"\bdont need\b|不要了|不需要|不用")
_MEMORY = re.compile(r"\b(?:memory|ram)\b|内存")


def forbidden(action: str, text: str) -> bool:
    """Whether a normalised question rules out a changing action that the model proposes for it."""
    if _ASKS.search(text):
        return True
    if _FORBIDS.search(_DISMISSES.sub(" ", text)):
        return True
    return action == "remove_model" and _MEMORY.search(text) is not None
