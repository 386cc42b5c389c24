"""The machine's memory, whatever the kernel says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.hal.meminfo import memory


def test_of_this_machine() -> None:
    total, available = memory()
    assert total is not None
    assert available is not None
    assert 1 << 20 < available <= total


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"MemTotal:  16 kB\nMemFree: 1 kB\nMemAvailable:  8 kB\n", (16384, 8192)),
        (b"MemTotal:\nMemAvailable: many kB\n", (None, None)),
        (b"MemTotal: 16 kB", (16384, None)),
        (b"\xff\xfe\x00", (None, None)),
        (b"", (None, None)),
        (b"x" * 100000 + b"\nMemTotal: 16 kB\n", (None, None)),
    ],
)
def test_odd_files(tmp_path: Path, text: bytes, found: tuple[int | None, int | None]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_bytes(text)
    assert memory(tmp_path) == found


def test_no_file(tmp_path: Path) -> None:
    assert memory(tmp_path) == (None, None)
