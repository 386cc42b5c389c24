"""What a backend's process is kept from. What the kernel here lacks is skipped, and said."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.remote import Limits, RemoteBackend

VENDOR = str(Path(__file__).with_name("vendor.py"))
_ONE = TensorSpec(DType.F32, (1,))
_GRAPH = Graph((Value("x", _ONE), Value("y", _ONE)), (Node("Double", 1, (0,), (1,)),), (0,), (1,))


@pytest.fixture(scope="module")
def confinement() -> dict[str, str]:
    with RemoteBackend(VENDOR).open() as context:
        return dict(context.confinement)


def _misbehave(device: str) -> None:
    with RemoteBackend(VENDOR).open(device) as context:
        x, y = context.allocator.upload(np.ones(1, np.float32)), context.allocator.tensor(_ONE)
        context.queue().submit(context.compile(_GRAPH), [x], [y]).wait(60)
        assert y.numpy().tolist() == [2]


def test_what_was_given_up_is_told(confinement: dict[str, str]) -> None:
    assert set(confinement) == {
        "ends with its parent", "limits", "no capabilities", "no new privileges", "files", "no network, no processes",
    }  # fmt: skip
    assert confinement["ends with its parent"] == confinement["limits"] == "yes"
    assert confinement["no new privileges"] == confinement["no capabilities"] == "yes"


@pytest.mark.parametrize("device", ["connect", "fork", "spawn", "kill-parent", "borrow"])
def test_no_network_and_no_other_process(device: str, confinement: dict[str, str]) -> None:
    if (state := confinement["no network, no processes"]) != "yes":
        pytest.skip(f"no filter of system calls here: {state}")
    with pytest.raises(BackendFailed, match="PermissionError"):
        _misbehave(device)


@pytest.mark.parametrize("device", ["write", "read"])
def test_no_files_of_others(device: str, confinement: dict[str, str]) -> None:
    if (state := confinement["files"]) != "yes":
        pytest.skip(f"no Landlock here: {state}")
    with pytest.raises(BackendFailed, match="PermissionError"):
        _misbehave(device)
    assert not Path(VENDOR).with_name("written-by-a-backend").exists()


def test_threads_are_allowed() -> None:
    _misbehave("threads")


def test_privileges_and_variables_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_OF_THE_PARENT", "hunter2")
    with RemoteBackend(VENDOR).open() as context:
        status = Path(f"/proc/{context.child.pid}/status").read_text()
        try:
            variables = Path(f"/proc/{context.child.pid}/environ").read_text()
        except PermissionError:  # the process cannot be looked into, so root alone sees it
            variables = ""
    assert "CapEff:\t0000000000000000" in status
    assert "CapPrm:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "A_SECRET_OF_THE_PARENT" not in variables


def test_it_ends_with_its_parent_even_when_it_hangs() -> None:
    code = f"""
import os, sys
sys.path[:] = {sys.path!r}
import numpy as np
from ai_assistant.hal.remote import Limits, RemoteBackend
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
one = TensorSpec(DType.F32, (1,))
graph = Graph((Value("x", one), Value("y", one)), (Node("Double", 1, (0,), (1,)),), (0,), (1,))
context = RemoteBackend({VENDOR!r}).open("hang-hard")
x, y = context.allocator.tensor(one), context.allocator.tensor(one)
context.queue().submit(context.compile(graph), [x], [y])
print(context.child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    pid = int(done.stdout)
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    pytest.fail("the process outlived its parent")


def test_memory_has_a_limit() -> None:
    backend = RemoteBackend(VENDOR, limits=Limits(memory_bytes=400 << 20))
    with backend.open() as context:
        limits = Path(f"/proc/{context.child.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "data size" in line).split()[3] == str(400 << 20)
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4] == "0"
