"""The developer image, booted once for all tests of this rung; the journal is printed when one fails."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from image.container import Container, image_path

OVERLAY = Path("/opt/test-packages")


@pytest.fixture(scope="session")
def appliance() -> Iterator[Container]:
    packages = Path(os.environ["AI_ASSISTANT_OVERLAY"])  # set by tests/overlay
    # For the inner loop: the checkout's Python over the image's, as make shell has it.
    checkout = os.environ.get("AI_ASSISTANT_TEST_CHECKOUT") == "1"
    with Container(image_path(), binds=[(packages, OVERLAY)], mount_checkout=checkout) as box:
        yield box


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        box = getattr(item, "funcargs", {}).get("appliance")
        if box is not None:
            journal = box.run("journalctl", "--no-pager", "-n", "60", check=False).stdout
            report.sections.append(("journal of the appliance", journal))
    return report
