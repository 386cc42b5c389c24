"""L3: operators against the reference, and the mandatory profile."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ai_assistant.errors import AIAssistantError, DeviceLost
from ai_assistant.hal.conformance import oracle
from ai_assistant.hal.conformance.case import Case, CaseFailed, Cases, Note, Unsupported
from ai_assistant.hal.conformance.families import FAMILIES
from ai_assistant.hal.conformance.families.row import OPSET, Draw, Row, Sample
from ai_assistant.hal.conformance.mandatory import PROFILE
from ai_assistant.hal.conformance.subject import Subject, run
from ai_assistant.hal.contract import Queue
from ai_assistant.hal.graph import DType

CASES = Cases()
PROFILE_PREFIX = "L3.profile."
_QUEUE = "queue of the operator cases"


def _queue(subject: Subject) -> Queue:
    if _QUEUE not in subject.shared:
        subject.shared[_QUEUE] = subject.common.queue()
    queue: Queue = subject.shared[_QUEUE]
    return queue


def attempt(subject: Subject, op: str, sample: Sample, opset: int, loose: float) -> None:
    """One example.

    Raises:
        Unsupported: the backend says that it cannot, with its reason.
        CaseFailed: it said that it can, and did not, or wrongly.
    """
    context = subject.common
    right = oracle.evaluate(op, sample, opset)
    graph = oracle.graph_of(op, sample, right, opset)
    support = context.supports(graph.nodes[0], graph)
    if not support:
        if not support.reason:
            raise CaseFailed("it is declared unsupported without a reason")
        raise Unsupported(support.reason)
    queue = _queue(subject)
    subject.doing(_shown(sample))
    try:
        program = context.compile(graph)
        try:
            arrays = [array for n, array in enumerate(sample.inputs) if array is not None and n not in sample.constant]
            found = run(context, queue, program, arrays)
        finally:
            program.close()
    except AIAssistantError as error:
        subject.shared.pop(_QUEUE).close()
        if isinstance(error, DeviceLost):
            subject.reopen()
        raise CaseFailed(f"it is declared supported, and raises {error.name}: {error.message}") from error
    oracle.compare(found, right, loose)


def _shown(sample: Sample) -> str:
    parts = []
    for number, array in enumerate(sample.inputs):
        if array is None:
            parts.append("none")
        else:
            parts.append(f"{array.dtype}{list(array.shape)}" + (" constant" if number in sample.constant else ""))
    return f"({', '.join(parts)}) {dict(sample.attributes) or ''}".strip()


def judge(subject: Subject, op: str, samples: Sequence[Sample], opset: int, loose: float) -> Note:
    """Try examples; what is told of those that fail is the smallest.

    Raises:
        CaseFailed, Unsupported: as `attempt`; unsupported only when every example is.
    """
    failures: list[tuple[int, str]] = []
    reasons: list[str] = []
    for sample in samples:
        try:
            attempt(subject, op, sample, opset, loose)
        except Unsupported as reason:
            reasons.append(str(reason))
        except CaseFailed as failure:
            size = sum(array.size for array in sample.inputs if array is not None)
            failures.append((size, f"{failure}; of {_shown(sample)}"))
        except Exception as error:
            raise CaseFailed(f"{type(error).__name__}: {error}; of {_shown(sample)}") from error
    if failures:
        raise CaseFailed(f"{len(failures)} of {len(samples)} examples: {min(failures)[1]}")
    if len(reasons) == len(samples):
        raise Unsupported(reasons[0])
    detail = f"unsupported: {reasons[0]}" if reasons else ""
    return Note(detail, len(samples), len(samples) - len(reasons))


def samples_of(row: Row, dtype: DType, count: int, start: int) -> list[Sample]:
    """Examples of a row, the same for the same numbers on every machine."""

    def made(draw: Any) -> Sample:
        return row.make(Draw(dtype, lambda low, high: draw(st.integers(low, high))))

    def collect(sample: Sample) -> None:
        found.append(sample)

    found: list[Sample] = []
    limits = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    start_of: Any = seed(zlib.crc32(f"{row.op}.{dtype}.{start}".encode()))
    collecting: Any = start_of(limits(given(st.composite(made)())(collect)))
    collecting()
    return found


def _sweep(row: Row, dtype: DType, subject: Subject) -> Note:
    samples = samples_of(row, dtype, subject.examples, subject.seed)
    return judge(subject, row.op, samples, row.opset, row.loose)


def _profile(operators: dict[str, tuple[Sample, ...]], subject: Subject) -> Note:
    missing = []
    for op, samples in operators.items():
        try:
            note = judge(subject, op, samples, OPSET, 4.0)
        except Unsupported as reason:
            missing.append(f"{op}: {reason}")
            continue
        if note.supported == note.examples:
            return Note(op if len(operators) > 1 else "", note.examples, note.supported)
        missing.append(f"{op}, in one of its plain forms: {note.detail}")
    raise CaseFailed(f"the mandatory profile needs it. {'; '.join(missing)}")


for _name, _operators in PROFILE.items():
    _id = PROFILE_PREFIX + _name.replace(" ", "")
    CASES.add(Case(_id, partial(_profile, _operators), f"{_name} runs in its plain forms.", 2))
for _family, _rows in FAMILIES.items():
    for _row in _rows:
        for _dtype in _row.dtypes:
            CASES.add(
                Case(f"L3.{_row.op}.{_dtype}", partial(_sweep, _row, _dtype), f"{_row.op} of {_dtype} ({_family}).", 2)
            )
