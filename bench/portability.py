"""One ONNX model and one application, unchanged, on x86-64 and on arm64, from a fresh machine to the first answer.

    tests/overlay bench portability [--arch ARCH] [--fresh] [--native] [--json]

A fresh machine is an empty folder: Debian's packages are resolved for the architecture, downloaded, unpacked, the
project's package and the application are copied in, and the application is started there as root of its own, without a
network. arm64 runs in QEMU's user mode (amd64 too, on an arm64 machine), whose times say nothing about a real one.

| claim | the other |
|---|---|
| application, model, picture and package have the same bytes on every machine | what lies in the checkout |
| every device answers there, as that kind of processor, by itself and when it is chosen | the devices asked |
| every score is within 1e-5 + 1e-4 of it everywhere | the first machine's first answer |
| from nothing to the first answer in a quarter of an hour | the goal itself |
| `--native`: the example backend in C, compiled for each, too; its code has vector instructions, and they run | one |

Every run unpacks and starts anew. Packages are downloaded once and kept, with the time that it took; `--fresh`
downloads again. Bytes and seconds of every step are in build/bench-portability.json.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np

from ai_assistant.errors import AIAssistantError, BackendFailed, Busy, NoSpace, NotSupported
from bench import _cross
from bench._debian import CHECKOUT, Packages
from bench._machine import MACHINES, Machine, digests, native, snapshot
from bench.harness import arguments, note, report
from bench.portable.claims import Answer, Story, claims, keep, table

NEEDED = ("base-files", "python3", "python3-numpy", "python3-onnx", "python3-onnxruntime")
DEVICES = ("cpu", "onnxruntime")
EXAMPLE = "example"
RESULT = CHECKOUT / "build" / "bench-portability.json"
_APPLICATION, _MODEL, _PICTURE = "/srv/classify.py", "/srv/model.onnx", "/srv/picture.npy"
_ROOM = "make room, or set XDG_CACHE_HOME to another disk"
_SCORES = "/srv/scores.npy"
_PACKAGE = "/usr/lib/python3/dist-packages/ai_assistant"
_SPACE = {False: 2.0e9, True: 4.0e9}
"""Bytes that the downloads and the folders take at most, without and with compilers."""


def ask(machine: Machine, device: str = "") -> Answer:
    """Start the application once.

    Raises:
        BackendFailed: it fails, or says what it should not.
        NotSupported, Timeout: as `Machine.run`.
    """
    scores = machine.root / _SCORES.lstrip("/")
    scores.unlink(missing_ok=True)
    environment = {"HETERO_COMPUTE": device} if device else {}
    done = machine.run(
        "/usr/bin/python3", _APPLICATION, _MODEL, _PICTURE, "--json", "--save", _SCORES, environment=environment
    )
    where = f"{machine.architecture}{f', {device}' if device else ''}"
    if done.status:
        raise BackendFailed(f"{where}: the application failed with {done.status}: {done.error.strip()[-600:]}")
    try:
        said = json.loads(done.output)
        found = np.load(scores, allow_pickle=False)
        return Answer(device, dict(said["devices"]), said["machine"], said["digest"], done.first_s, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendFailed(f"{where}: the application's answer is not understood: {error}") from error


@contextmanager
def _timed(story: Story, step: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    story.seconds[step] = time.monotonic() - begin


def live(
    architecture: str, originals: Mapping[str, Path], cache: Path, folder: Path, library: _cross.Library | None = None
) -> Story:
    """From an empty folder to every device's answer.

    Args:
        originals: place in the machine → file or folder here.
        cache: for what is downloaded.
        folder: empty; becomes the machine.
        library: the example in C, installed after the first answers.
    """
    packages = Packages(architecture, NEEDED, cache)
    packages.download()
    ledger = packages.ledger
    machine = Machine(architecture, folder, emulated=architecture != native())
    story = Story(architecture, machine.emulated, ledger.values["since"], len(packages.files), packages.bytes)
    story.seconds = {step: ledger.seconds(step) for step in ("index", "packages")}
    note(f"{architecture}: unpacking {story.packages} packages")
    with _timed(story, "unpack"):
        packages.unpack(folder)
    if machine.emulated:
        # Not in the machine's time: a real one has no emulator.
        emulator = Packages(native(), ("qemu-user",), cache)
        emulator.download()
        machine.add_emulator(emulator)
    with _timed(story, "install"):
        for place, source in originals.items():
            machine.put(source, place)
    note(f"{architecture}: the first answer{' (emulated)' if machine.emulated else ''}")
    story.answers.append(ask(machine))
    story.seconds["answer"] = story.answers[0].first_s
    if library is not None:
        _cross.drop_in(machine, library, folder.parent)
        story.vectors = library.vectors
    for device in DEVICES + ((EXAMPLE,) if library else ()):
        note(f"{architecture}: {device}")
        story.answers.append(ask(machine, device))
    if library is not None and machine.emulated:
        note(f"{architecture}: {EXAMPLE}, written down by the emulator")
        story.executed = _cross.executed(
            machine, _APPLICATION, _MODEL, _PICTURE, environment={"HETERO_COMPUTE": EXAMPLE}
        )
    story.digests = digests(folder, originals)
    return story


def _originals(folder: Path) -> dict[str, Path]:
    """What is carried to every machine."""
    from bench.portable import model

    try:
        from ai_assistant.hal import onnx_graph

        content = onnx_graph.write(model.classifier())
    except ImportError as error:
        raise NotSupported(f"{error}", hint="tests/overlay bench portability") from error
    (folder / "model.onnx").write_bytes(content)
    np.save(folder / "picture.npy", model.picture())
    return {
        _APPLICATION: Path(shutil.copy(CHECKOUT / "bench/portable/classify.py", folder)),
        _MODEL: folder / "model.onnx",
        _PICTURE: folder / "picture.npy",
        _PACKAGE: snapshot(folder / "ai_assistant"),
    }


def _own_digests(originals: Mapping[str, Path]) -> dict[str, str]:
    return {place: digests(source.parent, [source.name])[source.name] for place, source in originals.items()}


def measure(architectures: Sequence[str], cache: Path, *, fresh: bool, with_c: bool) -> list[Story]:
    """Every machine in turn. `cache` is this process's alone."""
    compilers = _cross.compilers(tuple(architectures), cache) if with_c else None
    if fresh:
        for each in (*(Packages(name, NEEDED, cache) for name in architectures), compilers):
            if each is not None:
                each.forget()
        Packages(native(), ("qemu-user",), cache).forget()
    free = shutil.disk_usage(cache).free
    if free < _SPACE[with_c]:
        raise NoSpace(
            f"{_SPACE[with_c] / 1e9:.0f} GB are needed, {free / 1e9:.1f} are left at {cache}",
            hint=_ROOM,
        )
    stories = []
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as text:
        folder = Path(text)
        folder.chmod(0o755)
        (folder / "originals").mkdir()
        originals = _originals(folder / "originals")
        wanted = _own_digests(originals)
        for place, digest in wanted.items():
            note(f"{place}: sha256 {digest}")
        libraries = _libraries(compilers, architectures, folder) if compilers else {}
        for name in architectures:
            root = folder / f"machine-{name}"
            root.mkdir(mode=0o755)
            story = live(name, originals, cache, root, libraries.get(name))
            story.same = sum(wanted[place] == digest for place, digest in story.digests.items())
            stories.append(story)
            # Half a gigabyte each: one at a time.
            shutil.rmtree(root)
    return stories


def _libraries(compilers: Packages, architectures: Sequence[str], folder: Path) -> dict[str, _cross.Library]:
    compilers.download()
    root = folder / "compilers"
    root.mkdir(mode=0o755)
    note(f"unpacking {len(compilers.files)} packages of compilers")
    compilers.unpack(root)
    found = {}
    for name in architectures:
        found[name] = _cross.compile_example(Machine(native(), root), name, folder / f"example-{name}.so")
        note(f"{name}: the example in C: {found[name].compiler}; {_cross.INSTRUCTIONS[name]}: {found[name].vectors}")
    shutil.rmtree(root)
    return found


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """No other run of this bench; what a killed one has left is taken away."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another run of this bench uses {cache}", hint="wait for it") from None
        for left in cache.glob("run-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("One model and one application, unchanged, on several architectures.")
    parser.add_argument(
        "--arch", action="append", choices=tuple(MACHINES), help="only that; may be given again (default: every one)"
    )
    parser.add_argument("--fresh", action="store_true", help="download again")
    parser.add_argument("--native", action="store_true", help="also the example backend in C, compiled for each")
    parser.epilog = "--pairs has no meaning here: a first answer comes once."
    return parser.parse_args(given)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(given: Sequence[str] | None = None) -> int:
    """Exit status 1 when a claim does not hold or something is missing, 130 when it was stopped."""
    options = parse_arguments(given)
    signal.signal(signal.SIGTERM, _stop)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant/portability"
    try:
        here = native()
        # This machine's own first: the others are compared with it.
        architectures = sorted(set(options.arch or MACHINES), key=lambda each: (each != here, each))
        with _alone(cache):
            stories = measure(architectures, cache, fresh=options.fresh, with_c=options.native)
        keep(stories, RESULT)
        note(table(stories))
        return report(claims(stories, originals=4), as_json=options.json)
    except AIAssistantError as error:
        note(f"portability: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""))
        return 1
    except OSError as error:
        note(f"portability: {error}")
        if error.errno == errno.ENOSPC:
            note(f"  hint: {_ROOM}")
        return 1
    except KeyboardInterrupt:
        note("portability: stopped; what was downloaded is kept")
        return 130


if __name__ == "__main__":
    sys.exit(main())
