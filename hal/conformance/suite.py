"""All cases, and what the suite is: its version and the hash of its files."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from ai_assistant.errors import NotSupported
from ai_assistant.hal.conformance import contract_cases, memory_cases, queue_cases
from ai_assistant.hal.conformance.case import Case

NEEDED = ("onnx", "hypothesis")


def cases(level: int, path: Path | None = None) -> tuple[Case, ...]:
    """The cases up to a level, 1 to 4.

    Args:
        path: of the backend's file; a shared library has its ABI tested too.

    Raises:
        NotSupported: the packages that levels 3 and 4 need are missing.
    """
    found = contract_cases.CASES.all()
    if path is not None and path.suffix == ".so":
        from ai_assistant.hal.conformance import abi_cases

        found = abi_cases.CASES.all() + found
    if level >= 2:
        found += memory_cases.CASES.all() + queue_cases.CASES.all()
    if level >= 3:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise NotSupported(
                f"operators are compared with onnx.reference, and {' and '.join(missing)} cannot be imported",
                hint="install python3-onnx and python3-hypothesis, or certify for bronze",
            )
        from ai_assistant.hal.conformance import operator_cases

        found += operator_cases.CASES.all()
    if level >= 4:
        from ai_assistant.hal.conformance import model_cases

        found += model_cases.CASES.all()
    return found


@cache
def digest() -> str:
    """SHA-256 over names and contents of the suite's files: reports are of one suite when it is the same."""
    here = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(here).as_posix()}\0{len(content)}\0".encode() + content)
    return total.hexdigest()
