"""How fast a model reads and writes, of the last seconds in which it did."""

from __future__ import annotations

_MEMORY_S = 4.0


class Rate:
    """A rate per second that forgets what is older than some seconds of work."""

    __slots__ = ("_count", "_seconds")

    def __init__(self) -> None:
        self._count = 0.0
        self._seconds = 0.0

    def add(self, count: float, seconds: float) -> None:
        keep = max(0.0, 1.0 - seconds / _MEMORY_S)
        self._count = self._count * keep + count
        self._seconds = self._seconds * keep + seconds

    @property
    def per_s(self) -> float:
        """0 while nothing is known."""
        return self._count / self._seconds if self._seconds > 0 else 0.0


class Mean:
    """A mean that follows slowly; None while nothing is known."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + (value - self.value) / 8
