"""What the stories share: a failing one prints the console and the journal, and leaves no process behind."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from image.vm import VM


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None:
        for machine in list(VM.live):
            report.sections.append((f"machine in {machine.base.name}", machine.report()))
    return report


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays() -> Iterator[None]:
    yield
    for machine in list(VM.live):
        machine.stop()
