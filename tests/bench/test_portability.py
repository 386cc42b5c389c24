"""The portability bench: what it compares, what it says when something is missing, and that it cleans up."""

from __future__ import annotations

import errno
import fcntl
import json
import platform
import shutil
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, Busy, DownloadFailed, NoSpace, NotSupported
from bench import _children, _cross, _machine, portability
from bench._children import Done
from bench._machine import Machine, digests, native
from bench.harness import report
from bench.portable.claims import ABSOLUTE, APART, MOST_S, RELATIVE, Answer, Story, apart, claims, keep, table

SCORES = np.array([[100.0, -1.0, 0.0]], np.float32)


def test_answers_agree_up_to_the_tolerance_and_not_beyond() -> None:
    assert apart(SCORES, SCORES) == 0
    allowed = ABSOLUTE + RELATIVE * np.abs(SCORES.astype(np.float64))
    assert apart(SCORES + 0.9 * allowed, SCORES.astype(np.float64)) == pytest.approx(0.9)
    assert apart(SCORES + np.array([[0, 0, 3 * ABSOLUTE]], np.float32), SCORES) == pytest.approx(3, rel=1e-3)
    assert apart(SCORES + np.array([[0.05, 0, 0]], np.float32), SCORES) > 1


@pytest.mark.parametrize(
    "other",
    [
        SCORES[:, :2],
        SCORES.ravel(),
        SCORES.astype(np.float64),
        np.full_like(SCORES, np.nan),
        np.array([[100.0, -1.0, np.inf]], np.float32),
        np.zeros((0, 3), np.float32),
    ],
)
def test_what_cannot_be_compared_does_not_agree(other: Any) -> None:
    assert apart(other, SCORES) == APART
    assert apart(SCORES, other) == APART


def test_two_empty_answers_are_no_agreement() -> None:
    assert apart(np.zeros(0, np.float32), np.zeros(0, np.float32)) == APART


def story(architecture: str = "amd64", **changes: Any) -> Story:
    machine = _machine.MACHINES[architecture]
    answers = [
        Answer(asked, {asked or "cpu": "1.0"}, machine, "d", 2.0, SCORES.copy()) for asked in ("", "cpu", "onnxruntime")
    ]
    values: dict[str, Any] = {
        "packages": 3,
        "bytes": {"index": 10_000_000, "packages": 40_000_000},
        "seconds": {"index": 1.0, "packages": 2.0, "unpack": 3.0, "install": 0.5, "answer": 2.0},
        "same": 4,
        "answers": answers,
    }
    return Story(architecture, architecture == "arm64", **(values | changes))


def broken(stories: list[Story], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The claims that do not hold; the exit status has to say the same."""
    rows = claims(stories, originals=4)
    found = [row.claim for row in rows if not row.holds]
    assert report(rows) == (1 if found else 0)
    capsys.readouterr()
    return found


def test_every_claim_holds_for_equal_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert broken([story(), story("arm64")], capsys) == []
    assert broken([story("arm64", vectors=7, executed=3)], capsys) == []
    # Nothing is compared with itself.
    assert len(claims([story()], originals=4)) == 5


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"same": 3}, "arm64: files and folders with the same bytes as here"),
        ({"seconds": {"index": MOST_S, "answer": 1.0}}, "arm64, emulated: nothing to first answer"),
        ({"vectors": 0}, "arm64: NEON's fmla on four floats in the example in C"),
        ({"vectors": 9, "executed": 0}, "arm64: those of them that ran"),
    ],
)
def test_a_machine_that_differs_breaks_its_claim(
    changes: dict[str, Any], claim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert broken([story(), story("arm64", **changes)], capsys) == [claim]


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "x86_64"},  # the emulator was not used
        {"used": {"onnxruntime": "1.21"}},  # another device than the one that was asked
        {"used": {}},
    ],
)
def test_an_answer_of_something_else_does_not_count(
    changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = story("arm64")
    other.answers[1] = replace(other.answers[1], **changes)
    assert broken([story(), other], capsys) == ["arm64: answers by the devices asked"]


def test_a_score_that_is_too_far_breaks_the_claim_of_its_device(capsys: pytest.CaptureFixture[str]) -> None:
    other = story("arm64")
    other.answers[2] = replace(other.answers[2], scores=SCORES + np.float32(0.1))
    assert broken([story(), other], capsys) == ["arm64: onnxruntime, farthest score"]


def test_the_table_and_the_record_have_every_step(tmp_path: Path) -> None:
    told = table([story(), story("arm64", downloaded="2026-11-23 08:00 UTC")])
    assert "| amd64 |  | 10.0 MB, 1.0 s | 3: 40.0 MB, 2.0 s | 3.0 s | 0.5 s | 2.0 s | 8.5 s |" in told
    assert "| arm64, emulated | 2026-11-23 08:00 UTC |" in told
    keep([story()], tmp_path / "build" / "record.json")
    (record,) = json.loads((tmp_path / "build/record.json").read_text())["machines"]
    assert record["total_s"] == 8.5
    assert record["answers"][2]["used"] == {"onnxruntime": "1.0"}


class Fake(Machine):
    """A machine whose application says what it is told to."""

    said: Done
    scores: Any = SCORES

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        emulator: Sequence[str] = (),
        timeout_s: float = 0.0,
    ) -> Done:
        assert command[0].startswith("/")
        assert set(environment or ()) <= {"HETERO_COMPUTE"}
        if self.scores is not None:
            (self.root / "srv").mkdir(exist_ok=True)
            np.save(self.root / "srv/scores.npy", self.scores)
        return self.said


GOOD = json.dumps({"best": [[1, 2.0]], "digest": "abc", "devices": {"cpu": "cpu 1.0"}, "machine": "aarch64"})


def fake(root: Path, monkeypatch: pytest.MonkeyPatch, said: Done, scores: Any = SCORES) -> Fake:
    monkeypatch.setattr(Fake, "said", said, raising=False)
    monkeypatch.setattr(Fake, "scores", scores)
    return Fake("arm64", root, emulated=True)


def test_an_answer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = portability.ask(fake(tmp_path, monkeypatch, Done(0, GOOD, "", 1.5, 2.0)), "cpu")
    assert (answer.asked, answer.machine, answer.first_s) == ("cpu", "aarch64", 1.5)
    assert answer.used == {"cpu": "cpu 1.0"}
    assert apart(answer.scores, SCORES) == 0


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (Done(3, "", "classify: no such operator", 1, 1), "no such operator"),
        (Done(-11, GOOD, "", 1, 1), "-11"),
        (Done(0, "", "", 1, 1), "not understood"),
        (Done(0, "class 5", "", 1, 1), "not understood"),
        (Done(0, "[]", "", 1, 1), "not understood"),
        (Done(0, "{}", "", 1, 1), "not understood"),
        (Done(0, '{"devices": 5, "machine": "", "digest": ""}', "", 1, 1), "not understood"),
    ],
)
def test_an_answer_that_is_none_is_an_error(
    done: Done, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendFailed, match=said):
        portability.ask(fake(tmp_path, monkeypatch, done), "cpu")


def test_scores_of_an_earlier_start_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    portability.ask(fake(tmp_path, monkeypatch, Done(0, GOOD, "", 1, 1)))
    with pytest.raises(BackendFailed, match="not understood"):
        portability.ask(fake(tmp_path, monkeypatch, Done(0, GOOD, "", 1, 1), scores=None))


def test_the_emulator_is_named_in_the_command(tmp_path: Path) -> None:
    emulated = Machine("arm64", tmp_path, emulated=True).command("/usr/bin/python3", "x y.py")
    assert emulated[-4:] == [str(tmp_path), "/.emulator", "/usr/bin/python3", "x y.py"]
    assert "--net" in emulated
    assert Machine("amd64", tmp_path).command("/bin/true")[-2:] == [str(tmp_path), "/bin/true"]


def test_the_emulators_options_are_its_own(tmp_path: Path) -> None:
    emulated = Machine("arm64", tmp_path, emulated=True).command("/bin/true", emulator=("-d", "in_asm"))
    assert emulated[-4:] == ["/.emulator", "-d", "in_asm", "/bin/true"]
    assert Machine("amd64", tmp_path).command("/bin/true", emulator=("-d", "in_asm"))[-1] == "/bin/true"


def test_vector_instructions_are_counted_and_scalar_ones_are_not() -> None:
    assert _cross.count("arm64", "  1a0:\tfmla\tv0.4s, v1.4s, v2.s[0]\n  1a4:\tfmadd\ts0, s1, s2, s3\n") == 1
    assert _cross.count("arm64", "  1a0:\tfmla\tv0.2d, v1.2d, v2.2d\nfmla v0.4s\n") == 0
    assert _cross.count("amd64", "  10:\tvfmadd231ps %ymm0,%ymm1,%ymm2\n  20:\tvfmadd231ss %xmm0,%xmm1,%xmm2\n") == 1


LOG = [
    "IN: \n",
    "0x00001000:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s\n",
    "0x00001000:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s\n",
    "0x00001004:  1f020c20  fmadd    s0, s1, s2, s3\n",
    "0x00001ffc:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s\n",
    "0x00002000:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s\n",
    "0x00000ffc:  4e22cc20  fmla     v0.4s, v1.4s, v2.4s\n",
    "\ufffd 0x\n",
]


def test_only_instructions_of_the_library_count_each_once() -> None:
    maps = (
        f"00001000-00002000 r-xp 00000000 fe:00 7   {_cross.LIBRARY}\n"
        f"00002000-00003000 r--p 00001000 fe:00 7   {_cross.LIBRARY}\n"
        "00000000-00001000 r-xp 00000000 fe:00 8   /usr/lib/other.so\n"
    )
    assert _cross.addresses("arm64", LOG, maps) == 2
    assert _cross.addresses("arm64", LOG, "") == 0
    assert _cross.addresses("amd64", LOG, maps) == 0


def test_a_root_that_cannot_be_entered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Done(1, "", "unshare: unshare failed: Operation not permitted\n", 0, 0)
    monkeypatch.setattr(_children, "run", lambda *given, **named: refused)
    with pytest.raises(NotSupported, match="not permitted") as error:
        Machine("amd64", tmp_path).run("/bin/true")
    assert "root" in error.value.hint


def test_only_known_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, architecture in (("x86_64", "amd64"), ("aarch64", "arm64")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert native() == architecture
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NotSupported, match="riscv64"):
        native()


def test_compilers_are_for_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "gcc-aarch64-linux-gnu" in _cross.compilers(("amd64", "arm64"), tmp_path).names
    assert not [each for each in _cross.compilers(("amd64",), tmp_path).names if "aarch64" in each or "cross" in each]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "gcc-x86-64-linux-gnu" in _cross.compilers(("amd64", "arm64"), tmp_path).names


def test_digests_see_names_and_content_but_not_what_python_compiles(tmp_path: Path) -> None:
    package = tmp_path / "usr/package"
    package.mkdir(parents=True)
    (package / "one.py").write_text("1")
    first = digests(tmp_path, ["/usr/package"])
    (package / "__pycache__").mkdir()
    (package / "__pycache__/one.pyc").write_text("x")
    assert digests(tmp_path, ["/usr/package"]) == first
    (package / "one.py").rename(package / "two.py")
    renamed = digests(tmp_path, ["/usr/package"])
    assert renamed != first
    (package / "two.py").write_text("2")
    assert digests(tmp_path, ["/usr/package"]) not in (first, renamed)


def test_a_folder_is_replaced_and_not_merged(tmp_path: Path) -> None:
    machine = Machine("amd64", tmp_path / "root")
    for name in ("old", "new"):
        source = tmp_path / name
        source.mkdir()
        (source / f"{name}.py").touch()
        machine.put(source, "/usr/package")
    assert [each.name for each in (tmp_path / "root/usr/package").iterdir()] == ["new.py"]


def test_the_package_is_copied_whole_and_without_links(tmp_path: Path) -> None:
    found = _machine.snapshot(tmp_path / "copy")
    assert (found / "hal/onnx_graph.py").is_file()
    assert not [each for each in found.rglob("*") if each.is_symlink() or each.name == "__pycache__"]


def test_two_runs_at_once_are_refused_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "run-dead/usr").mkdir(parents=True)
    (tmp_path / "amd64-1").mkdir()
    with portability._alone(tmp_path):
        assert sorted(each.name for each in tmp_path.iterdir()) == ["amd64-1", "lock"]
        with pytest.raises(Busy), portability._alone(tmp_path):
            pass
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_that_is_too_small_is_said_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))
    with pytest.raises(NoSpace, match=r"0\.1 are left") as error:
        portability.measure(("amd64",), tmp_path, fresh=False, with_c=False)
    assert "XDG_CACHE_HOME" in error.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DownloadFailed("no answer", hint="see whether the network works"), 1, "hint: see whether the network works"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "hint: make room"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (KeyboardInterrupt(), 130, "what was downloaded is kept"),
    ],
)
def test_the_end_of_a_run_that_did_not_work(
    error: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*given: Any, **named: Any) -> list[Story]:
        raise error

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(portability, "measure", fails)
    assert portability.main([]) == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_rows_alone_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(names: list[str], cache: Path, **named: Any) -> list[Story]:
        asked.append((names, named))
        return [story(each) for each in names]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(portability, "RESULT", tmp_path / "record.json")
    monkeypatch.setattr(portability, "measure", measured)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert portability.main(["--json", "--pairs", "9", "--native", "--fresh"]) == 0
    # This machine's own is the first: others are compared with it.
    assert asked == [(["arm64", "amd64"], {"fresh": True, "with_c": True})]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 11
    assert all(row["holds"] for row in rows)


@pytest.mark.parametrize("given", [["--arch", "riscv64"], ["--arch"], ["amd64"], ["--pairs", "many"]])
def test_wrong_options_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        portability.parse_arguments(given)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
