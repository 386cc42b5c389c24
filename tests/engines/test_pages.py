"""Fresh memory that is given back, and stays what it was."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ai_assistant.engines import pages

SIZE = pages.LEAST + (4 << 20)


def mapped(size: int = SIZE) -> tuple[mmap.mmap, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, np.frombuffer(memory, dtype=np.uint8)


def test_zeros_are_given_back_and_what_is_written_stays() -> None:
    with pages.opening() as fresh:
        kept, view = mapped()
        view[:] = 0
        view[5 << 20] = 7
    assert fresh.untouched_bytes() == 0
    given = fresh.give_back()
    assert SIZE - (2 << 20) <= given < SIZE
    assert fresh.untouched_bytes() == given
    assert view[5 << 20] == 7
    assert view.sum() == 7
    view[9 << 20 : 10 << 20] = 1
    assert fresh.untouched_bytes() == given - (1 << 20)
    assert len(kept) == SIZE


def test_what_was_there_before_is_nobodys_to_give() -> None:
    before, view = mapped()
    view[:] = 0
    with pages.opening() as fresh:
        small, little = mapped(pages.LEAST // 2)
        little[:] = 0
    address = view.ctypes.data
    assert not any(first < address + SIZE and address < end for first, end in fresh.ranges)
    assert (len(before), len(small)) == (SIZE, pages.LEAST // 2)


@pytest.mark.parametrize(
    ("ranges", "taken", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]),
        ([(5, 6)], [(0, 5), (6, 9)], [(5, 6)]),
    ],
)
def test_without(ranges: list[pages.Range], taken: list[pages.Range], left: list[pages.Range]) -> None:
    assert pages.without(ranges, taken) == left


def test_only_private_writable_memory_without_a_file() -> None:
    text = """\
1000-2000 rw-p 00000000 00:00 0
2000-3000 r--p 00000000 00:00 0
3000-4000 rw-s 00000000 00:00 0
4000-5000 rw-p 00000000 fe:01 77 /usr/lib/x.so
5000-6000 rw-p 00000000 00:00 0 [heap]
7ffff000-7ffff800 rw-p 00000000 00:00 0
"""
    assert pages.parse_maps(text) == [(0x1000, 0x2000), (0x7FFFF000, 0x7FFFF800)]


def test_written_bytes_of_a_range() -> None:
    text = """\
1000-3000 rw-p 00000000 00:00 0
Size:                  8 kB
Anonymous:             4 kB
VmFlags: rd wr mr
3000-9000 rw-p 00000000 00:00 0
Anonymous:            16 kB
9000-a000 r--p 00000000 fe:01 9 /usr/lib/a b.so
Anonymous:             4 kB
"""
    assert pages.taken_in(text, (0x1000, 0x9000)) == 20 << 10
    assert pages.taken_in(text, (0x2000, 0x9000)) == 20 << 10
    assert pages.taken_in(text, (0x2800, 0x3000)) == 2 << 10
