"""L2, work: order, events, failure, threads, stress."""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ai_assistant.errors import AIAssistantError, NotSupported, Timeout
from ai_assistant.hal.conformance.case import CaseFailed, Cases, Note, Unsupported, expect
from ai_assistant.hal.conformance.subject import WAIT_S, Subject, run
from ai_assistant.hal.contract import Context, Event, Queue, Tensor

CASES = Cases()


def _queues(context: Context, wanted: int) -> list[Queue]:
    most = context.capabilities.max_queues
    return [context.queue() for _ in range(min(wanted, most) if most else wanted)]


class Gate:
    """A callback that holds a queue until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self._open.wait(WAIT_S)

    def open(self) -> None:
        self._open.set()


@CASES.case("L2.run")
def run_sizes(subject: Subject) -> None:
    """A program gives the right result for many sizes."""
    with subject.context() as context:
        random = subject.random()
        queue = context.queue()
        for columns in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257):
            work = subject.work(context, (2, columns))
            arrays = work.arrays(random)
            work.check(run(context, queue, work.program, arrays)[0], arrays, f"for {columns} columns")


@CASES.case("L2.asynchronous")
def asynchronous(subject: Subject) -> None:
    """Submitting returns although the queue is held, and an event that is waited for too briefly says so."""
    with subject.context() as context:
        work = subject.work(context)
        arrays = work.arrays(subject.random())
        inputs = [context.allocator.upload(array) for array in arrays]
        output = context.allocator.tensor(work.output)
        queue, gate = context.queue(), Gate()
        try:
            held = queue.callback(gate)
            event = queue.submit(work.program, inputs, [output])
            expect(gate.reached.wait(WAIT_S), "a callback was not called")
            expect(not held.done and not event.done, "an event is done before what it stands for has ended")
            for wait in (event.wait, queue.synchronize):
                try:
                    wait(0.01)
                except Timeout:
                    continue
                raise CaseFailed("waiting for work that is held came back without Timeout")
        finally:
            gate.open()
        event.wait(WAIT_S)
        expect(event.done, "an event that was waited for is not done")
        event.wait(WAIT_S)
        work.check(context.allocator.download(output), arrays)
        queue.synchronize(WAIT_S)


@CASES.case("L2.descriptor")
def descriptor(subject: Subject) -> None:
    """An event's descriptor is readable once the event is done, and not before."""

    def readable(event: Event, seconds: float) -> bool:
        poll = select.poll()
        poll.register(event.fileno(), select.POLLIN)
        found = poll.poll(seconds * 1000)
        expect(all(what & select.POLLIN for _, what in found), "the descriptor of an event is none, or was closed")
        return bool(found)

    with subject.context() as context:
        queue, gate = context.queue(), Gate()
        try:
            queue.callback(gate)
            event = queue.record()
            unasked = queue.record()
            try:
                early = readable(event, 0.05)
            except NotSupported as error:
                raise Unsupported(error.message) from error
            expect(not early, "the descriptor of an event is readable before the event is done")
        finally:
            gate.open()
        expect(readable(event, WAIT_S), "the descriptor of an event that is done is not readable")
        expect(event.done, "the descriptor of an event is readable before the event is done")
        unasked.wait(WAIT_S)
        expect(readable(unasked, 1), "the descriptor of an event that was done before it was asked for is not readable")
        expect(readable(event, 1), "a descriptor does not stay readable")


@CASES.case("L2.order")
def order(subject: Subject) -> None:
    """Work of one queue runs in the order in which it was submitted."""
    with subject.context() as context:
        work = subject.work(context)
        random = subject.random()
        arrays = work.arrays(random)
        queue = context.queue()
        rest = [context.allocator.upload(array) for array in arrays[1:]]
        steps = 40
        chain = [context.allocator.upload(arrays[0])]
        chain += [context.allocator.tensor(work.output) for _ in range(steps)]
        for tensor in chain[1:]:
            context.allocator.copy_in(tensor.buffer, np.full(work.made, np.nan, np.float32))
        called: list[int] = []
        callbacks: list[Callable[[], None]] = [lambda number=number: called.append(number) for number in range(steps)]  # type: ignore[misc]
        for number in range(steps):
            # What a step reads, the step before makes: another order leaves NaN or old values.
            queue.submit(work.program, [chain[number], *rest], [chain[number + 1]])
            queue.callback(callbacks[number])
        event = queue.record()
        event.wait(WAIT_S)
        expect(called == list(range(steps)), f"callbacks were called in the order {called[:12]}…")
        wanted = arrays[0]
        for _ in range(steps):
            wanted = work.right([wanted, *arrays[1:]])
        found = context.allocator.download(chain[-1])
        expect(
            np.allclose(found, wanted, rtol=1e-3, atol=1e-4, equal_nan=True), "a chain of programs ran in another order"
        )


@CASES.case("L2.events")
def events(subject: Subject) -> None:
    """Work that waits for an event of another queue runs after it."""
    with subject.context() as context:
        queues = _queues(context, 2)
        if len(queues) < 2:
            raise Unsupported("the device has one queue only")
        first, second = queues
        work = subject.work(context)
        arrays = work.arrays(subject.random())
        rest = [context.allocator.upload(array) for array in arrays[1:]]
        for number in range(20):
            start = context.allocator.upload(arrays[0])
            middle, end = context.allocator.tensor(work.output), context.allocator.tensor(work.output)
            context.allocator.copy_in(middle.buffer, np.full(work.made, np.nan, np.float32))
            gate = Gate()
            try:
                first.callback(gate)
                made = first.submit(work.program, [start, *rest], [middle])
                second.wait(made)
                last = second.submit(work.program, [middle, *rest], [end])
                expect(gate.reached.wait(WAIT_S), "a callback was not called")
                with contextlib.suppress(Timeout):
                    last.wait(0.05 if number < 3 else 0.0)  # time to make the mistake in
                expect(not last.done, "work ran before the event of another queue that it waits for")
            finally:
                gate.open()
            last.wait(WAIT_S)
            again = work.right([work.right(arrays), *arrays[1:]])
            found = context.allocator.download(end)
            expect(np.allclose(found, again, rtol=1e-4, atol=1e-5), "work did not wait for an event of another queue")


@CASES.case("L2.queues.beside")
def beside(subject: Subject) -> None:
    """A queue that is held does not hold another one."""
    with subject.context() as context:
        queues = _queues(context, 2)
        if len(queues) < 2:
            raise Unsupported("the device has one queue only")
        gate = Gate()
        try:
            queues[0].callback(gate)
            expect(gate.reached.wait(WAIT_S), "a callback was not called")
            work = subject.work(context)
            arrays = work.arrays(subject.random())
            work.check(run(context, queues[1], work.program, arrays)[0], arrays)
        finally:
            gate.open()


@CASES.case("L2.queues.limit")
def queue_limit(subject: Subject) -> None:
    """A device with so many queues refuses one more."""
    with subject.context() as context:
        most = context.capabilities.max_queues
        if not most:
            raise Unsupported("the device has any number of queues")
        held = [context.queue() for _ in range(most)]
        try:
            context.queue()
        except NotSupported:
            held[0].close()
            return
        raise CaseFailed(f"the device says it has {most} queues, and gave one more")


@CASES.case("L2.failure")
def failure(subject: Subject) -> None:
    """What fails in a queue fails what comes after it, until synchronize has told so; then the queue works again."""
    with subject.context() as context:
        work = subject.work(context)
        arrays = work.arrays(subject.random())
        inputs = [context.allocator.upload(array) for array in arrays]
        output = context.allocator.tensor(work.output)
        context.allocator.copy_in(output.buffer, np.full(work.made, 7, np.float32))
        queue, gate = context.queue(), Gate()

        def broken() -> None:
            gate()
            raise RuntimeError("made to fail")

        bad = queue.callback(broken)
        after = queue.submit(work.program, inputs, [output])
        gate.open()
        for event in (bad, after):
            _fails("an event of work that failed", event.wait)
        expect(np.all(context.allocator.download(output) == 7), "work ran although what came before it failed")
        _fails("synchronize after a failure", queue.synchronize)
        queue.synchronize(WAIT_S)
        work.check(run(context, queue, work.program, arrays)[0], arrays, "after a failure")


def _fails(what: str, wait: Callable[[float], None]) -> None:
    try:
        wait(WAIT_S)
    except Timeout as error:
        raise CaseFailed(f"{what} does not end") from error
    except AIAssistantError:
        return
    except Exception as error:
        raise CaseFailed(f"{what} raises {type(error).__name__}, which is no named error") from error
    raise CaseFailed(f"{what} says that all is well")


@CASES.case("L2.close")
def close(subject: Subject) -> None:
    """Closing ends after what was submitted, twice does no harm, and a closed queue takes no more."""
    context = subject.backend.open(subject.device)
    work = subject.work(context)
    arrays = work.arrays(subject.random())
    inputs = [context.allocator.upload(array) for array in arrays]
    outputs = [context.allocator.tensor(work.output) for _ in range(20)]
    queue = context.queue()
    made = [queue.submit(work.program, inputs, [output]) for output in outputs]
    queue.close()
    queue.close()
    expect(all(event.done for event in made), "closing a queue came back before its work had ended")
    for output in outputs:
        work.check(context.allocator.download(output), arrays, "before closing")
    try:
        queue.submit(work.program, inputs, outputs[:1])
    except AIAssistantError:
        pass
    else:
        raise CaseFailed("a closed queue takes work")
    context.close()
    context.close()


def _many(context: Context, queue: Queue, subject: Subject, seed: int, times: int) -> None:
    """Raises CaseFailed: a result is wrong."""
    random = np.random.default_rng((subject.seed, seed))
    work = subject.work(context, (1, 1 + seed * 7 % 97))
    sets = []
    for _ in range(times):
        arrays = work.arrays(random)
        inputs = [context.allocator.upload(array) for array in arrays]
        output = context.allocator.tensor(work.output)
        sets.append((arrays, inputs, output, queue.submit(work.program, inputs, [output])))
    for arrays, _, output, event in sets:
        event.wait(WAIT_S)
        work.check(context.allocator.download(output), arrays, "while other threads worked")


@CASES.case("L2.threads", weight=2)
def threads(subject: Subject) -> None:
    """Threads compile, allocate and submit at once, each to its own queue and all to one."""
    with subject.context() as context:
        queues = _queues(context, 6)
        with ThreadPoolExecutor(6) as pool:
            jobs = [
                pool.submit(_many, context, queues[number % len(queues)], subject, number, 25) for number in range(6)
            ]
            jobs += [pool.submit(_many, context, queues[0], subject, number, 25) for number in range(6, 12)]
            for job in jobs:
                job.result()


@CASES.case("L2.stress", weight=3)
def stress(subject: Subject) -> Note:
    """Thousands of submissions over several queues all end, with the right results."""
    with subject.context() as context:
        queues = _queues(context, 4)
        work = subject.work(context, (1, 33))
        random = subject.random()
        sets = [work.arrays(random) for _ in range(8)]
        inputs = [[context.allocator.upload(array) for array in arrays] for arrays in sets]
        total = 4000
        last: dict[int, tuple[Tensor, int]] = {}
        outputs = [[context.allocator.tensor(work.output) for _ in range(8)] for _ in queues]
        for number in range(total):
            lane, which = number % len(queues), int(random.integers(0, 8))
            queues[lane].submit(work.program, inputs[which], [outputs[lane][which]])
            last[lane * 8 + which] = (outputs[lane][which], which)
        for queue in queues:
            queue.synchronize(WAIT_S)
        for tensor, which in last.values():
            work.check(context.allocator.download(tensor), sets[which], "under load")
        return Note(f"{total} submissions over {len(queues)} queues")
