"""The example backend in C, compiled for any architecture by compilers that are unpacked and not installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import BackendFailed
from bench._debian import CHECKOUT, Packages
from bench._machine import MACHINES, Machine, native

LIBRARY = "/usr/lib/example/libexample.so"
DROP_IN = "/usr/lib/ai-assistant/backends.d/example.toml"
_SOURCES = ("hal/include", "hal/examples/vendor-c")
# Multiply and add several floats at once. NEON is part of every arm64; AVX2 is chosen when the library is loaded.
_VECTORS = {"arm64": r"\bfmla\s+v\d+\.4s", "amd64": r"\bvfmadd\w+ps\s+.*%[yz]mm"}
_WATCHED = """\
import atexit, pathlib, runpy, sys
atexit.register(lambda: pathlib.Path({maps!r}).write_text(pathlib.Path("/proc/self/maps").read_text()))
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
"""Runs a script, and writes down at its end where everything lay."""
INSTRUCTIONS = {"arm64": "NEON's fmla on four floats", "amd64": "AVX2's vfmadd on eight floats"}


@dataclass(frozen=True, slots=True)
class Library:
    """Args:
    vectors: instructions in it that multiply and add several floats at once.
    """

    path: Path
    compiler: str
    vectors: int


def compilers(architectures: tuple[str, ...], cache: Path) -> Packages:
    """What compiles for all of these here."""
    names = ["base-files", "dash", "coreutils", "make", "gcc", "libc6-dev"]
    for each in architectures:
        if each != native():
            names += [f"gcc-{_triplet(each).replace('_', '-')}", f"libc6-dev-{each}-cross"]
    return Packages(native(), tuple(names), cache)


def compile_example(tools: Machine, architecture: str, target: Path) -> Library:
    """Compile the example with its own Makefile.

    Raises:
        BackendFailed: it does not compile, with what the compiler says.
    """
    for each in _SOURCES:
        tools.put(CHECKOUT / each, f"/build/{each}")
    folder = f"/build/{_SOURCES[1]}"
    compiler = f"{_triplet(architecture)}-gcc"
    # The folder may have a library of an earlier `make` by hand in it.
    done = tools.run("/usr/bin/make", "--always-make", "--directory", folder, f"CC={compiler}")
    made = tools.root / folder.lstrip("/") / "example.so"
    if done.status or not made.is_file():
        raise BackendFailed(f"the example in C cannot be compiled for {architecture}: {done.error.strip()[-600:]}")
    target.write_bytes(made.read_bytes())
    version = tools.run(f"/usr/bin/{compiler}", "--version").output.splitlines()
    shown = tools.run(
        f"/usr/bin/{_triplet(architecture)}-objdump", "--disassemble", "--no-show-raw-insn", f"{folder}/example.so"
    )
    if shown.status:
        raise BackendFailed(f"the example in C cannot be read: {shown.error.strip()[-200:]}")
    return Library(target, version[0] if version else compiler, count(architecture, shown.output))


def drop_in(machine: Machine, library: Library, folder: Path) -> None:
    """Install it as a vendor's package would: a library and a file that names it.

    It is loaded into the process that uses it. One of its own would be started by the kernel, which knows no emulator.
    """
    description = folder / "example.toml"
    description.write_text(f'library = "{LIBRARY}"\ntrusted = true\n')
    machine.put(library.path, LIBRARY)
    machine.put(description, DROP_IN)


def executed(machine: Machine, *command: str, environment: Mapping[str, str]) -> int:
    """How many of the library's vector instructions an emulated program comes to: what QEMU translates, it runs.

    Args:
        command: a Python script and its arguments, started once more, since the emulator writes everything down.

    Raises:
        BackendFailed: the script fails.
    """
    log, maps = "/var/tmp/executed", "/var/tmp/maps"
    watched = _WATCHED.format(maps=maps, script=command[0])
    done = machine.run(
        "/usr/bin/python3", "-c", watched, *command[1:],
        environment=environment, emulator=("-d", "in_asm", "-D", log),
    )  # fmt: skip
    here = [machine.root / each.lstrip("/") for each in (log, maps)]
    if done.status or not all(each.is_file() for each in here):
        raise BackendFailed(f"{machine.architecture}: nothing was written down: {done.error.strip()[-200:]}")
    with here[0].open(errors="replace") as lines:
        return addresses(machine.architecture, lines, here[1].read_text())


def count(architecture: str, text: str) -> int:
    """Vector instructions in what objdump shows."""
    return len(re.findall(rf"^\s*[0-9a-f]+:.*?{_VECTORS[architecture]}", text, re.MULTILINE))


def addresses(architecture: str, log: Iterable[str], maps: str) -> int:
    """Different vector instructions in QEMU's log that lie in the library.

    Args:
        maps: /proc/self/maps.
    """
    ranges = [
        (int(found[1], 16), int(found[2], 16))
        for found in re.finditer(rf"^([0-9a-f]+)-([0-9a-f]+) r-x.*{re.escape(LIBRARY)}$", maps, re.MULTILINE)
    ]
    pattern = re.compile(rf"0x([0-9a-f]+):.*?{_VECTORS[architecture]}")
    seen = {int(found[1], 16) for line in log if (found := pattern.match(line))}
    return sum(any(begin <= each < end for begin, end in ranges) for each in seen)


def _triplet(architecture: str) -> str:
    return f"{MACHINES[architecture]}-linux-gnu"
