"""When the model is sure enough to act.

The confidence of a call is the product of the probabilities of its tokens, before the grammar has its
say: it falls both when two actions are alike and when the grammar had to forbid what the model wanted.
The recipe makes the beginning of a call one token, so this is the probability of the action times that
of its argument.

The thresholds were chosen on models/eval/dev.jsonl, where no answer above them is wrong; models/MODEL_CARD.md
has what they do to questions that were never looked at. Changing something by mistake costs more than
asking again, so it takes more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

READ_THRESHOLD = 0.80
CHANGE_THRESHOLD = 0.85


def confidence(logprobs: Iterable[float]) -> float:
    """The product of the tokens' probabilities, 0 to 1.

    Args:
        logprobs: natural logarithms; anything above 0 counts as 0 (rounding).
    """
    # What is no number is no reason to act; and min(0.0, nan) would be 0.0, that is: certain.
    return math.exp(math.fsum(-math.inf if math.isnan(each) else min(0.0, each) for each in logprobs))


def sure(value: float, *, changes: bool) -> bool:
    return value >= (CHANGE_THRESHOLD if changes else READ_THRESHOLD)
