"""Which workers the daemon starts: those that may open a GPU only where the configuration gives one to models."""

from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.app import Options, worker_socket


@pytest.mark.parametrize(
    ("setting", "name"),
    [("", "worker.sock"), ("OFF", "worker.sock"), ("off", "worker.sock"), ("ON", "gpu-worker.sock"),
     ("latency", "gpu-worker.sock"), ("ggml:Vulkan0", "gpu-worker.sock")],
)  # fmt: skip
def test_only_models_that_may_use_a_gpu_get_one(tmp_path: Path, setting: str, name: str) -> None:
    folder = tmp_path / "etc/ai-assistant/config.d"
    folder.mkdir(parents=True)
    if setting:
        (folder / "50-test.toml").write_text(f'[models]\nhetero_compute = "{setting}"\n')
    found = worker_socket(Options(root=tmp_path), configuration.load(tmp_path))
    assert found == Path("/run/ai-assistant") / name
