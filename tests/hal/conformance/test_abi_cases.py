"""L1 of shared libraries: the example in C with one promise taken out, and the case that must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.errors import BackendFailed, NotSupported
from ai_assistant.hal.conformance.case import Outcome, Result
from ai_assistant.hal.conformance.run import Settings, run
from tests.hal.native.build import EXAMPLE, library

pytestmark = pytest.mark.engine
F, C = Outcome.FAILED, Outcome.CRASHED


def changed(folder: Path, old: str, new: str) -> Path:
    source = (EXAMPLE / "example.c").read_text()
    assert source.count(old) >= 1, "the example does not read so any more"
    path = folder / "example.c"
    path.write_text(source.replace(old, new, 1))
    return library(
        folder,
        "changed",
        [path, EXAMPLE / "operators.c"],
        "-O1",
        f"-I{EXAMPLE}",
        "-Wno-unused",
        "-Wno-unused-parameter",
    )


def outcome(path: Path, case: str) -> Result:
    return next(each for each in run(Settings(str(path), level=2, only=(case,))).results if each.case == case)


@pytest.mark.parametrize(
    ("old", "new", "case", "outcomes", "says"),
    [
        ("major == AI_HAL_MAJOR ?", "major ?", "L1.abi.major", (F,), "speaks version 2"),
        ("|| !AI_HAL_HAS(args, type, last)", "", "L1.abi.size", (F,), "takes arguments of 0 bytes"),
        ("|| !AI_HAL_HAS(args, type, last)", "|| (args)->size != sizeof(type)", "L1.abi.minor", (F,), "does not open"),
        ("    if (!(what)) return fail(", "    if (0) return fail(", "L1.abi.null", (C,), "SIGSEGV at "),
        (
            "if (offset > buffer->nbytes || nbytes > buffer->nbytes - offset)",
            "if (offset + nbytes > buffer->nbytes)",
            "L1.abi.outside",
            (F, C),
            "",
        ),
        (
            "found->size = sizeof *found; /* What is filled in. */",
            "memset(found, 0, found->size + 32); found->size = sizeof *found;",
            "L1.abi.filled",
            (F, C),
            "",
        ),
        ("sizeof made->public, code,", "sizeof made->public, code + 1,", "L1.abi.errors", (F,), "the error's code"),
        (
            "    NEED(args->device);",
            '    if (args->next) return fail(error, AI_HAL_NOT_SUPPORTED, NULL, "what is that?");',
            "L1.abi.extensions",
            (F,),
            "does not open",
        ),
        ("    NEED(args->device);", "    *context = NULL;", "L1.abi.errors", (F,), "changed its result"),
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
        outcome(changed(tmp_path, ".allocate = allocate,", ""), "L1.abi.table")


def test_what_is_no_library_is_no_backend(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(NotSupported, match="cannot be loaded"):
        outcome(path, "L1.abi.table")
