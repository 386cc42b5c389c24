"""Parts of the serving bench that look at the engine itself, in processes of their own."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench._load import words
from bench._servers import CONTEXT, python


def variant(model: Path, plugin: str | None, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    """(prefill, decode) in tokens per second with one CPU plug-in, or with the one that is picked of all."""
    arguments = ("bench._engine", "variant", str(model), str(threads), str(prompt), str(tokens))
    if plugin is None:
        found = json.loads(python(*arguments))
        return float(found[0]), float(found[1])
    import llama_cpp

    package = Path(llama_cpp.__file__).parent
    with tempfile.TemporaryDirectory(prefix="variant-") as name:
        # The whole package: its modules find the libraries beside themselves.
        shutil.copytree(package, Path(name) / "llama_cpp", symlinks=True)
        for each in (Path(name) / "llama_cpp" / "lib").glob("libggml-cpu-*.so"):
            if each.name != f"libggml-cpu-{plugin}.so":
                each.unlink()
        found = json.loads(python(*arguments, env={"PYTHONPATH": f"{name}:{':'.join(sys.path[1:])}"}))
    return float(found[0]), float(found[1])


def overhead(model: Path, tokens: int) -> float:
    """Microseconds per token and step that are not spent in the library's decoding."""
    return float(python("bench._engine", "overhead", str(model), str(tokens)))


def estimate(model: Path, sequences: int, threads: int) -> int:
    """Bytes that the product says the model will take."""
    from ai_assistant.engines import gguf_rules, memory
    from ai_assistant.engines.contract import LoadOptions
    from ai_assistant.engines.gguf import opened, read_gguf

    options = LoadOptions(context_length=CONTEXT, sequences=sequences, threads=threads, kv_type="f16")
    with opened(str(model)) as fd:
        header = read_gguf(fd)
    return int(gguf_rules.estimate_memory_bytes(header, memory.settled(gguf_rules.memory_shape(header), options)))


def bandwidth(megabytes: int = 256) -> float:
    """Bytes per second that all cores together read from memory: the best of five passes."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from ai_assistant.engines.native import default_threads

    threads = default_threads()
    parts = [np.ones((megabytes << 20) // 8 // threads) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(lambda part: float(part.sum()), parts))
            best = max(best, sum(each.nbytes for each in parts) / (time.perf_counter() - begin))
    return best


def _measure_variant(model: str, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    from ai_assistant.engines.contract import Finished, GenerateRequest, LoadOptions
    from ai_assistant.engines.llama import LlamaEngine

    options = LoadOptions(context_length=CONTEXT, sequences=1, threads=threads, kv_type="f16", speculative="off")
    with LlamaEngine.open(model, options) as engine:
        for seed in range(2):  # the first warms up
            request = GenerateRequest(
                prompt=words(seed, prompt // 3), max_tokens=tokens, temperature=0.0, ignore_eos=True
            )
            for event in engine.generate(request):
                if isinstance(event, Finished):
                    usage = event.usage
    return usage.prompt_tokens / usage.prefill_s, (usage.completion_tokens - 1) / usage.decode_s


def _measure_overhead(model: str, tokens: int) -> float:
    from ai_assistant.engines.contract import Finished, GenerateRequest, LoadOptions
    from ai_assistant.engines.llama import LlamaEngine

    options = LoadOptions(context_length=CONTEXT, sequences=1, threads=1, kv_type="f16", speculative="off")
    with LlamaEngine.open(model, options) as engine:
        context = engine._scheduler._context
        plain, inside = context.decode, 0.0

        def timed(batch: object) -> int:
            nonlocal inside
            begin = time.perf_counter()
            code = int(plain(batch))
            inside += time.perf_counter() - begin
            return code

        context.decode = timed
        usage = None
        for seed in range(2):
            inside = 0.0
            request = GenerateRequest(prompt=words(seed, 4), max_tokens=tokens, temperature=0.0, ignore_eos=True)
            for event in engine.generate(request):
                if isinstance(event, Finished):
                    usage = event.usage
        assert usage is not None
        return (usage.prefill_s + usage.decode_s - inside) / usage.completion_tokens * 1e6


def main(arguments: list[str]) -> int:
    kind, model, *numbers = arguments
    if kind == "variant":
        print(json.dumps(_measure_variant(model, *(int(each) for each in numbers))))
    else:
        print(_measure_overhead(model, int(numbers[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
