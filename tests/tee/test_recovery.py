"""The recovery key until it is acknowledged: shown to its owner, lost by nobody, and left nowhere."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ai_assistant.errors import InternalError, InvalidRecoveryKey, NoRecoveryKey, NoSpace
from ai_assistant.tee.vault.recovery import Recovery, redacted
from tests.support.recovery import KEY, OTHER, flag, key_waits

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = "var/lib/ai-assistant-recovery"


def test_it_is_shown_until_it_is_acknowledged(tmp_path: Path) -> None:
    path, recovery = key_waits(tmp_path), Recovery(tmp_path)
    assert recovery.pending()
    assert recovery.key() == recovery.key() == KEY
    recovery.acknowledge()
    assert not recovery.pending()
    assert not path.exists()
    assert not flag(tmp_path).exists()
    with pytest.raises(NoRecoveryKey):
        recovery.key()
    with pytest.raises(NoRecoveryKey):
        recovery.acknowledge()
    (left,) = (tmp_path / FOLDER).iterdir()
    assert left.name == "acknowledged"
    assert left.stat().st_mode & 0o077 == 0
    assert KEY not in left.read_text()


def test_another_key_is_another_wait(tmp_path: Path) -> None:
    key_waits(tmp_path)
    recovery = Recovery(tmp_path)
    recovery.acknowledge()
    key_waits(tmp_path, OTHER)
    assert recovery.key() == OTHER
    recovery.acknowledge()
    assert not recovery.pending()


def test_a_machine_without_one(tmp_path: Path) -> None:
    recovery = Recovery(tmp_path)
    assert not recovery.pending()
    with pytest.raises(NoRecoveryKey, match="made none"):
        recovery.key()
    (tmp_path / FOLDER).mkdir(parents=True, mode=0o700)
    with pytest.raises(NoRecoveryKey, match="no recovery key waits"):
        recovery.acknowledge()


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", KEY[:-1].encode(), KEY.encode() * 2, KEY.encode() + b"\n\n", KEY.replace("c", "a").encode(),
     KEY.upper().encode(), os.urandom(71), b"x" * (8 << 20)],
    ids=["empty", "newline", "short", "twice", "two lines", "other letters", "capitals", "binary", "huge"],
)  # fmt: skip
def test_a_damaged_one_is_neither_shown_nor_acknowledged(tmp_path: Path, content: bytes) -> None:
    path, recovery = key_waits(tmp_path, content), Recovery(tmp_path)
    for attempt in (recovery.key, recovery.acknowledge):
        with pytest.raises(InvalidRecoveryKey) as caught:
            attempt()
        assert "systemd-cryptenroll" in caught.value.hint
        assert KEY[:20] not in caught.value.message + caught.value.hint
    # It is still the owner's business, and the evidence is still there.
    assert recovery.pending()
    assert path.stat().st_size == len(content)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_one_that_others_could_read_is_no_secret(tmp_path: Path, mode: int) -> None:
    key_waits(tmp_path).chmod(mode)
    with pytest.raises(InvalidRecoveryKey, match="others could have read it"):
        Recovery(tmp_path).key()


def test_a_folder_that_others_can_write_is_no_safe(tmp_path: Path) -> None:
    key_waits(tmp_path).parent.chmod(0o777)
    with pytest.raises(InvalidRecoveryKey, match="others could have changed it"):
        Recovery(tmp_path).key()


def test_links_are_not_followed(tmp_path: Path) -> None:
    path, recovery = key_waits(tmp_path), Recovery(tmp_path)
    path.rename(tmp_path / "key")
    path.symlink_to(tmp_path / "key")
    with pytest.raises(InvalidRecoveryKey, match="symbolic link"):
        recovery.key()
    path.unlink()
    (tmp_path / "key").rename(path)
    # What lies where the acknowledgement goes is replaced, never written through.
    (tmp_path / "victim").write_text("precious")
    (path.parent / "acknowledged").symlink_to(tmp_path / "victim")
    recovery.acknowledge()
    assert (tmp_path / "victim").read_text() == "precious"
    folder = path.parent
    (folder / "acknowledged").unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(InternalError):
        recovery.key()


@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path, recovery = key_waits(tmp_path), Recovery(tmp_path)
    real = getattr(os, call)

    def full(*args: object, **more: object) -> object:
        if call != "open" or (isinstance(args[1], int) and args[1] & os.O_CREAT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(NoSpace, match="nothing has changed"):
            recovery.acknowledge()
    assert recovery.key() == KEY
    assert [each.name for each in path.parent.iterdir()] == ["key"]
    assert flag(tmp_path).exists()
    recovery.acknowledge()
    assert not recovery.pending()


def test_a_key_that_cannot_be_removed_yet_is_not_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, recovery = key_waits(tmp_path), Recovery(tmp_path)

    def failing(*args: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "unlink", failing)
        recovery.acknowledge()
        with pytest.raises(NoRecoveryKey, match="acknowledged already"):
            recovery.key()
    assert "cannot remove the acknowledged recovery key yet" in caplog.text
    assert KEY not in caplog.text
    assert path.exists()
    recovery.tidy()
    assert not path.exists()
    assert not flag(tmp_path).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from ai_assistant.tee.vault.recovery import Recovery
left = int(sys.argv[2])
def lethal(name):
    real = getattr(os, name)
    def call(*args, **more):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*args, **more)
    setattr(os, name, call)
for each in ("open", "fsync", "rename", "unlink"):
    lethal(each)
Recovery(Path(sys.argv[1])).acknowledge()
"""


def test_killed_at_any_point_it_is_acknowledged_or_it_waits(tmp_path: Path) -> None:
    outcomes = []
    for point in range(20):
        root = tmp_path / str(point)
        path, recovery = key_waits(root), Recovery(root)
        done = subprocess.run([sys.executable, "-c", KILLED, root, str(point)], cwd=CHECKOUT)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        removed = not path.exists()
        # As at the next start of the service.
        recovery.tidy()
        outcomes.append((recovery.pending(), removed))
        if recovery.pending():
            assert recovery.key() == KEY
            assert flag(root).exists()
            recovery.acknowledge()
        assert not path.exists()
        assert not flag(root).exists()
    # First it waits; then it is acknowledged and the key still lies there; then the key is gone.
    assert outcomes == sorted(outcomes, key=lambda each: (not each[0], each[1]))
    assert {(True, False), (False, False), (False, True)} == set(outcomes)


def test_what_a_tool_says_never_has_a_key_in_it() -> None:
    assert redacted(f"cannot open with {KEY}: wrong") == "cannot open with (a recovery key): wrong"
    assert redacted("nothing to hide") == "nothing to hide"
