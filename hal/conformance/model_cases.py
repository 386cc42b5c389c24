"""L4: whole networks, how much of them the backend runs, and whether it can go on doing so."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ai_assistant.hal.conformance import networks, oracle, reference
from ai_assistant.hal.conformance.case import Case, CaseFailed, Cases, Note, expect
from ai_assistant.hal.conformance.fallback import Mixed
from ai_assistant.hal.conformance.memory_cases import GROWTH_BYTES, resident_bytes
from ai_assistant.hal.conformance.networks import Network
from ai_assistant.hal.conformance.subject import Subject
from ai_assistant.hal.contract import Queue
from ai_assistant.hal.graph import Array

CASES = Cases()
MAX_FALLBACK = 0.1
"""At most so many of a network's nodes may be computed by somebody else."""
LOOSE = 20.0
"""Factor on the tolerance: differences add up over layers."""


@contextmanager
def _ready(subject: Subject, network: Network) -> Iterator[tuple[Mixed, Queue]]:
    from ai_assistant.hal import onnx_graph

    with subject.context() as context:
        mixed = Mixed(context, onnx_graph.read(network.model))
        try:
            yield mixed, context.queue()
        finally:
            mixed.close()


def right(network: Network) -> list[Array]:
    names = [value.name for value in network.model.graph.input]
    found: Any = reference.load()(network.model).run(None, dict(zip(names, network.inputs, strict=True)))
    return [np.asarray(each) for each in found]


def _fallback(mixed: Mixed) -> str:
    return "; ".join(f"{op}: {reason}" for op, reason in mixed.reasons.items())[:200]


def _network(make: Callable[[np.random.Generator], Network], subject: Subject) -> Note:
    network = make(subject.random())
    with _ready(subject, network) as (mixed, queue):
        found = mixed.run(queue, network.inputs)
        again = mixed.run(queue, network.inputs)
        oracle.compare(again, found)
        oracle.compare(found, right(network), LOOSE)
        share = f"{network.about}, {mixed.ratio:.1%} of {len(network.model.graph.node)} nodes computed elsewhere"
        expect(mixed.ratio <= MAX_FALLBACK, f"{share}, at most {MAX_FALLBACK:.0%} may be: {_fallback(mixed)}")
        return Note(share + (f" ({_fallback(mixed)})" if mixed.missing else ""))


def _soak(subject: Subject) -> Note:
    network = networks.transformer(subject.random())
    true = right(network)
    with _ready(subject, network) as (mixed, queue):
        end = time.monotonic() + subject.soak_s
        runs, resident = 0, 0
        while time.monotonic() < end or runs < 20:
            try:
                oracle.compare(mixed.run(queue, network.inputs), true, LOOSE)
            except CaseFailed as failure:
                raise CaseFailed(f"run {runs + 1}: {failure}") from failure
            runs += 1
            if runs == 10:
                gc.collect()
                resident = resident_bytes()
        gc.collect()
        growth = resident_bytes() - resident
        expect(growth < GROWTH_BYTES, f"the process grew by {growth >> 20} MiB in {runs} runs")
        return Note(f"a transformer block over and over for {subject.soak_s:g} s")


for _name, _make, _about in (
    ("transformer", networks.transformer, "A transformer block gives the right result."),
    ("cnn", networks.cnn, "A convolutional network gives the right result."),
    ("minilm", networks.mini_lm, "MiniLM gives the right vectors."),
):
    CASES.add(Case(f"L4.{_name}", partial(_network, _make), _about, 3))
CASES.add(Case("L4.soak", _soak, "A network is run over and over: every result is right, and no memory is lost."))
