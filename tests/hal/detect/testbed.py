"""umockdev's testbed: a /sys that libudev believes, whose devices come and go while a program runs.

Its library is called by its C interface, since the tools tree has no GObject introspection. The process must run
under `umockdev-wrapper`, which puts umockdev's preload library in front.
"""

from __future__ import annotations

import ctypes


class Testbed:
    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libumockdev.so.0")
        self._lib.umockdev_testbed_new.restype = ctypes.c_void_p
        self._bed = ctypes.c_void_p(self._lib.umockdev_testbed_new())

    def add(self, description: str) -> None:
        """Devices as umockdev-record writes them; no event is sent."""
        error = ctypes.c_void_p()
        call = self._lib.umockdev_testbed_add_from_string
        if not call(self._bed, ctypes.c_char_p(description.encode()), ctypes.byref(error)):
            raise ValueError("umockdev does not take this description")

    def remove(self, path: str) -> None:
        self._lib.umockdev_testbed_remove_device(self._bed, ctypes.c_char_p(path.encode()))

    def event(self, path: str, action: str) -> None:
        self._lib.umockdev_testbed_uevent(self._bed, ctypes.c_char_p(path.encode()), ctypes.c_char_p(action.encode()))
