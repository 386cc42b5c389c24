"""The example backend in C, compiled for any architecture by compilers that are unpacked and not installed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import BackendFailed
from bench._debian import CHECKOUT, Packages
from bench._machine import MACHINES, Machine, native

LIBRARY = "/usr/lib/example/libexample.so"
DROP_IN = "/usr/lib/ai-assistant/backends.d/example.toml"
_SOURCES = ("hal/include", "hal/examples/vendor-c")
_VECTORS = {
    # Multiply and add four floats at once; NEON is part of every arm64. AVX2 is chosen when the library is loaded.
    "arm64": re.compile(r"^\s*[0-9a-f]+:\s+fmla\s+v\d+\.4s", re.MULTILINE),
    "amd64": re.compile(r"^\s*[0-9a-f]+:\s+vfmadd\w+ps\s+.*%[yz]mm", re.MULTILINE),
}
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
    return Library(target, version[0] if version else compiler, len(_VECTORS[architecture].findall(shown.output)))


def drop_in(machine: Machine, library: Library, folder: Path) -> None:
    """Install it as a vendor's package would: a library and a file that names it.

    It is loaded into the process that uses it. One of its own would be started by the kernel, which knows no emulator.
    """
    description = folder / "example.toml"
    description.write_text(f'library = "{LIBRARY}"\ntrusted = true\n')
    machine.put(library.path, LIBRARY)
    machine.put(description, DROP_IN)


def _triplet(architecture: str) -> str:
    return f"{MACHINES[architecture]}-linux-gnu"
