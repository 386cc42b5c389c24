"""Whether a GGUF model can be loaded as somebody wants it: the options, and the memory that was given to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ai_assistant.engines import gguf_rules, memory
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.gguf import Gguf, read_gguf
from ai_assistant.engines.placing import avoided, intent_of
from ai_assistant.errors import InvalidArgument, OutOfMemory

MAX_SEQUENCES = 64
MAX_QUEUED = 64
SPECULATIVE = ("auto", "off", "lookup", "draft")


def checked_options(options: LoadOptions) -> LoadOptions:
    """The options, if they make sense.

    Raises:
        InvalidArgument: with the option's name.
    """
    for name, low, high in (
        ("context_length", 0, gguf_rules.MAX_CONTEXT),
        ("sequences", 1, MAX_SEQUENCES),
        ("threads", 0, 512),
        ("batch_tokens", 1, 8192),
        ("memory_limit_bytes", 0, 1 << 50),
        ("kv_limit_bytes", 0, 1 << 50),
        ("spill_memory_bytes", 0, 1 << 50),
        ("spill_disk_bytes", 0, 1 << 50),
    ):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidArgument(f"{name} must be between {low} and {high}, not {value!r:.40}", param=name)
    for name, words in (("kv_type", ("auto", "f16", "q8_0", "q4_0")), ("speculative", SPECULATIVE)):
        if getattr(options, name) not in words:
            raise InvalidArgument(f"{name} must be one of {', '.join(words)}", param=name)
    intent_of(options)
    avoided(options)
    queued = options.extra.get("max_queued", MAX_QUEUED)
    if isinstance(queued, bool) or not isinstance(queued, int) or not 0 <= queued <= 1024:
        raise InvalidArgument("max_queued must be between 0 and 1024", param="max_queued")
    return replace(options, batch_tokens=max(options.batch_tokens, options.sequences))


def check_memory(header: Gguf, options: LoadOptions, files: Mapping[str, int], placed_bytes: int | None = None) -> None:
    """Compare the estimate with `memory_limit_bytes`, if there is one.

    Args:
        files: descriptors that come with the model, a draft model among them.
        placed_bytes: what the model takes of the host's memory where other devices have some of it.

    Raises:
        OutOfMemory: with the numbers.
        InvalidModel: the draft model cannot be run.
    """
    limit = options.memory_limit_bytes
    if not limit:
        return
    draft = None
    if "draft" in files and options.speculative not in ("off", "lookup"):
        smaller = read_gguf(files["draft"])
        gguf_rules.check(smaller)
        draft = gguf_rules.memory_shape(smaller)
    shape = gguf_rules.memory_shape(header)
    needed = memory.estimate(shape, options, draft).total_bytes
    if placed_bytes is not None:
        needed += placed_bytes - memory.estimate(shape, options).total_bytes
    if needed > limit:
        raise OutOfMemory(
            f"the model needs about {needed >> 20} MiB ({header.weight_bytes >> 20} MiB of weights, "
            f"{gguf_rules.kv_bytes(header, options) >> 20} MiB for {options.sequences} × {options.context_length} "
            f"tokens); the limit is {limit >> 20} MiB",
            hint="load with a smaller context_length or fewer sequences",
        )
