"""Compiling C for tests: the example, and libraries that misbehave."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
INCLUDE = ROOT / "hal/include"
EXAMPLE = ROOT / "hal/examples/vendor-c"
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{INCLUDE}")


def gcc(*arguments: str | Path, compiler: str = "gcc") -> None:
    """Raises AssertionError with what the compiler said."""
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def library(folder: Path, name: str, sources: Sequence[Path], *options: str) -> Path:
    """A shared library of some C files."""
    made = folder / f"{name}.so"
    gcc("-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", *STRICT, *options, "-o", made, *sources, "-lm")
    return made


def example(folder: Path, *options: str) -> Path:
    return library(folder, "example", [EXAMPLE / "example.c"], "-O3", *options)


def faulty(folder: Path) -> Path:
    """The example with a fault that the environment's HAL_FAULT names when it is loaded: see faults.c."""
    return library(folder, "faulty", [Path(__file__).with_name("faults.c")], "-O1", f"-I{EXAMPLE}")
