"""A real worker, confined as its unit confines it as far as a test can, with an ONNX model on devices of its choice."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.hetero import Wish
from ai_assistant.errors import OutOfMemory
from tests.support import onnx_writer as writer

pytestmark = pytest.mark.engine
TEXTS = ["the cat sat on the mat .", "a dog", "blue sky , red sun", "cats walked " * 12]
LIMIT = 600 << 20
# No new privileges, no page that becomes executable, few descriptors; and no folder of its own.
_CONFINED = """
import ctypes, resource, runpy, sys
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(65, 1, 0, 0, 0) == 0
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.argv = ["worker", "--fd", sys.argv[1]]
runpy.run_module("ai_assistant.daemon.worker", run_name="__main__")
"""


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    return subprocess.Popen(
        [sys.executable, "-c", _CONFINED, str(fd)],
        pass_fds=[fd],
        env=environment | {"HOME": "/", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )


@asynccontextmanager
async def confined(folder: Path, limit_bytes: int = LIMIT) -> AsyncIterator[WorkerClient]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = _spawn(theirs.fileno())
    client = WorkerClient(ours)
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context((folder / name).open("rb")).fileno()
                for name in ("model.onnx", "tokenizer.json", "config.json")
            }
            model = files.pop("model.onnx")
            await client.load(model, LoadOptions(memory_limit_bytes=limit_bytes), files=files)
        yield client
    finally:
        await client.close()
        await asyncio.to_thread(process.wait, 20)


async def test_plans_are_made_and_given_back(tmp_path: Path) -> None:
    writer.write_folder(tmp_path)
    async with confined(tmp_path) as worker:
        expected, tokens = await worker.embed(TEXTS)
        for text in ("OFF", "ON", "cpu", "cpu,onnxruntime", "performance"):
            wish = Wish(text)
            vectors, count = await worker.embed(TEXTS, wish)
            assert count == tokens
            assert wish.devices, text
            for mine, theirs in zip(vectors, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        # Those who ask for memory get it, and everything can be had again.
        await worker.trim()
        wish = Wish("cpu")
        assert (await worker.embed(TEXTS, wish))[1] == tokens
        assert wish.devices == ("cpu",)


async def test_the_models_memory_is_not_exceeded(tmp_path: Path) -> None:
    writer.write_folder(tmp_path)
    # What the estimate of the model is, and hardly more: the process itself takes most of it.
    async with confined(tmp_path, 114 << 20) as worker:
        expected = await worker.embed(TEXTS)
        with pytest.raises(OutOfMemory, match="it was given 119537664") as caught:
            await worker.embed(TEXTS, Wish("cpu"))
        assert caught.value.param == "hetero_compute"
        wish = Wish("onnxruntime")
        assert await worker.embed(TEXTS, wish) == expected
        assert await worker.embed(TEXTS) == expected
