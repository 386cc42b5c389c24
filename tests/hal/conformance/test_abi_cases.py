"""L1 of shared libraries: the example in C with one promise taken out, and the case that must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.errors import BackendFailed, NotSupported
from ai_assistant.hal.conformance.case import Outcome, Result
from ai_assistant.hal.conformance.run import Settings, run
from tests.hal.native.build import EXAMPLE, INCLUDE, library

pytestmark = pytest.mark.engine
F, C = Outcome.FAILED, Outcome.CRASHED


def changed(folder: Path, old: str, new: str) -> Path:
    """The example with one passage of it, or of the kit's headers, changed."""
    texts = {path.name: path.read_text() for path in (EXAMPLE / "example.c", *INCLUDE.glob("*.h"))}
    name = next((each for each, text in texts.items() if old in text), None)
    assert name, "neither the example nor the kit reads so any more"
    texts[name] = texts[name].replace(old, new, 1)
    for each, text in texts.items():
        (folder / each).write_text(text)
    return library(folder, "changed", [folder / "example.c"], "-O1", "-Wno-unused", "-Wno-unused-parameter")


def outcome(path: Path, case: str) -> Result:
    return next(each for each in run(Settings(str(path), level=2, only=(case,))).results if each.case == case)


@pytest.mark.parametrize(
    ("old", "new", "case", "outcomes", "says"),
    [
        ("major == AI_HAL_MAJOR ?", "major ?", "L1.abi.major", (F,), "speaks version 2"),
        ("|| !AI_HAL_HAS(pointer, type, last)", "", "L1.abi.size", (F,), "takes arguments of 0 bytes"),
        (
            "|| !AI_HAL_HAS(pointer, type, last)",
            "|| (pointer)->size != sizeof(type)",
            "L1.abi.minor",
            (F,),
            "does not open",
        ),
        ("if (!(pointer)) return ai_hal_fail(", "if (0) return ai_hal_fail(", "L1.abi.null", (C,), "SIGSEGV at "),
        (
            "if (offset > buffer->nbytes || nbytes > buffer->nbytes - offset)",
            "if (offset + nbytes > buffer->nbytes)",
            "L1.abi.outside",
            (F, C),
            "",
        ),
        (
            "if (size > room) size = room;",
            "memset(found, 0, room + 32);",
            "L1.abi.filled",
            (F, C),
            "",
        ),
        ("made->error.code = code;", "made->error.code = code + 1;", "L1.abi.errors", (F,), "the error's code"),
        (
            "    AI_HAL_NEED(args->device);",
            '    if (args->next) return FAIL(NOT_SUPPORTED, "what is that?");',
            "L1.abi.extensions",
            (F,),
            "does not open",
        ),
        ("    AI_HAL_NEED(args->device);", "    *context = NULL;", "L1.abi.errors", (F,), "changed its result"),
    ],
)
def test_a_library_that_breaks_the_abi_is_caught(
    tmp_path: Path, old: str, new: str, case: str, outcomes: tuple[Outcome, ...], says: str
) -> None:
    found = outcome(changed(tmp_path, old, new), case)
    assert found.outcome in outcomes, found
    assert says in found.detail


def test_a_library_without_a_function_that_is_needed_is_no_backend(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed):
        outcome(changed(tmp_path, ".allocate = ai_hal_host_allocate,", ""), "L1.abi.table")


def test_what_is_no_library_is_no_backend(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(NotSupported, match="cannot be loaded"):
        outcome(path, "L1.abi.table")
