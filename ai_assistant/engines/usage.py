"""Several answers to one prompt: what each is asked with, and what they cost together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ai_assistant.engines.contract import GenerateRequest, Usage


def seeded(request: GenerateRequest, n: int) -> list[GenerateRequest]:
    """The request for each answer: with a seed given, each has its own, so that they differ and can be had again."""
    if request.seed is None:
        return [request] * n
    # Beyond the largest seed come the negative ones.
    return [replace(request, seed=(request.seed + k + 2**63) % 2**64 - 2**63) for k in range(n)]


def together(usages: Sequence[Usage]) -> Usage:
    """The sum for answers that ran side by side on the same prompt.

    The prompt counts once, and as cached only what the first to read it found in the cache. Times are those of
    the slowest, since the answers share the steps; energy is the sum, unknown when one of them is.
    """
    if not usages:
        return Usage()
    joules = [each.energy_j for each in usages]
    return Usage(
        prompt_tokens=max(each.prompt_tokens for each in usages),
        completion_tokens=sum(each.completion_tokens for each in usages),
        cached_tokens=min(each.cached_tokens for each in usages),
        queue_s=max(each.queue_s for each in usages),
        prefill_s=max(each.prefill_s for each in usages),
        decode_s=max(each.decode_s for each in usages),
        energy_j=None if None in joules else sum(each for each in joules if each is not None),
        devices=tuple(dict.fromkeys(name for each in usages for name in each.devices)),
    )
