"""Parts of the serving bench that look at the engine itself, in processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench._load import words
from bench._servers import CONTEXT, cache, peer, python


def variant(model: Path, plugin: str | None, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    """(prefill, decode) in tokens per second with one CPU plug-in, or with the one that is picked of all.

    Args:
        prompt: words.
    """
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


def overhead(model: Path, tokens: int) -> dict[str, float]:
    """Microseconds per token and step that are not spent in the library, by case; see `_measure_overhead`."""
    found = json.loads(python("bench._engine", "overhead", str(model), str(tokens)))
    return {name: float(each) for (name, *_), each in zip(OVERHEAD_CASES, found, strict=True)}


def estimate(model: Path, sequences: int, threads: int, context: int) -> int:
    """Bytes that the product says the model will take."""
    from ai_assistant.engines import gguf_rules, memory
    from ai_assistant.engines.contract import LoadOptions
    from ai_assistant.engines.gguf import opened, read_gguf

    options = LoadOptions(context_length=context, sequences=sequences, threads=threads, kv_type="f16")
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


def transformers(
    folder: Path, shape: dict[str, Any], prompts: list[list[int]], tokens: int, threads: int
) -> dict[str, int]:
    """Memory of Hugging Face transformers after these prompts in bytes; see `bench/_transformers.py`.

    Args:
        folder: where its weights lie; made when it is not there.
        shape: one of `SHAPES`.
    """
    values = {
        "num_hidden_layers": shape["layers"], "hidden_size": shape["width"], "vocab_size": shape["vocabulary"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "intermediate_size": shape["hidden"], "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
    }  # fmt: skip
    task = json.dumps({"model": values, "prompts": prompts, "tokens": tokens})
    run = [
        str(peer("hugging-face") / "run"),
        str(Path(__file__).with_name("_transformers.py")),
        str(folder),
        str(threads),
    ]
    while True:
        log = cache() / "transformers.log"
        with log.open("wb") as errors:
            done = subprocess.run(run, input=task, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"serving: transformers failed with {done.returncode}; see {log}")
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        # Where the weights had to be made first, the process was another one than what is to be measured.
        if "made" not in found:
            return found


def tokens_of(model: Path, texts: list[str]) -> list[list[int]]:
    """What texts are read as, as token numbers."""
    return [list(map(int, each)) for each in json.loads(python("bench._engine", "tokens", str(model), *texts))]


def _measure_tokens(model: str, texts: list[str]) -> list[list[int]]:
    from ai_assistant.engines.contract import LoadOptions
    from ai_assistant.engines.llama import LlamaEngine

    with LlamaEngine.open(model, LoadOptions(context_length=256, sequences=1, repack=False)) as engine:
        return [engine._vocabulary.tokenize(each, begin=True).tolist() for each in texts]


def _measure_variant(model: str, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    from ai_assistant.engines.contract import Finished, GenerateRequest, LoadOptions
    from ai_assistant.engines.llama import LlamaEngine

    options = LoadOptions(context_length=CONTEXT, sequences=1, threads=threads, kv_type="f16", speculative="off")
    with LlamaEngine.open(model, options) as engine:
        for seed, size, most in ((0, 2, 2), (1, prompt, tokens)):  # the first warms up
            request = GenerateRequest(prompt=words(seed, size), max_tokens=most, temperature=0.0, ignore_eos=True)
            for event in engine.generate(request):
                if isinstance(event, Finished):
                    usage = event.usage
    return usage.prompt_tokens / usage.prefill_s, (usage.completion_tokens - 1) / usage.decode_s


OVERHEAD_CASES = (("greedy, 1 stream", 1, 0.0), ("greedy, 8 streams", 8, 0.0), ("drawn, 8 streams", 8, 0.8))
_NATIVE = ("llama_decode", "llama_sampler_apply", "llama_sampler_accept")
_GENERATIONS = 7
_PACE_S = 0.04


def _measure_overhead(model: str, tokens: int) -> list[float]:
    """Processor time of the engine's thread outside the library, per token, for each of the cases.

    Processor time, so that waiting for a core, which other work on the machine causes, is nobody's overhead. One thread
    decodes, so that all of the library's work is on that thread's clock, too. The choice of the greatest logit, views
    of logits and the reading of pieces count as ours; only decoding and the library's samplers do not.
    """
    import threading
    from statistics import median

    from ai_assistant.engines.contract import GenerateRequest, LoadOptions
    from ai_assistant.engines.llama import LlamaEngine

    options = LoadOptions(context_length=CONTEXT, sequences=8, threads=1, kv_type="f16", speculative="off")
    with LlamaEngine.open(model, options) as engine:
        lib, inside = engine._lib, 0.0

        def clocked(name: str) -> None:
            plain = getattr(lib, name)

            def call(*arguments: object) -> object:
                nonlocal inside
                begin = time.thread_time()
                found = plain(*arguments)
                inside += time.thread_time() - begin
                return found

            setattr(lib, name, call)

        for each in _NATIVE:
            clocked(each)
        thread = engine._scheduler._thread.ident
        assert thread is not None
        clock = time.pthread_getcpuclockid(thread)

        def generate(seed: int, temperature: float) -> None:
            request = GenerateRequest(
                prompt=words(seed, 4), max_tokens=tokens, temperature=temperature, seed=seed, ignore_eos=True
            )
            # As the worker does: somebody who waits for each token would wake, and take the interpreter, at each.
            generation = engine.generate(request)
            while generation.gather(_PACE_S):
                pass

        out = []
        for _, streams, temperature in OVERHEAD_CASES:
            found = []
            for _ in range(_GENERATIONS + 1):  # the first reads the tokens' texts, once per model
                inside, begin = 0.0, time.clock_gettime(clock)
                threads = [threading.Thread(target=generate, args=(each, temperature)) for each in range(streams)]
                for one in threads:
                    one.start()
                for one in threads:
                    one.join()
                found.append((time.clock_gettime(clock) - begin - inside) / (tokens * streams) * 1e6)
            out.append(median(found[1:]))
        return out


def main(arguments: list[str]) -> int:
    kind, model, *numbers = arguments
    if kind == "variant":
        print(json.dumps(_measure_variant(model, *(int(each) for each in numbers))))
    elif kind == "tokens":
        print(json.dumps(_measure_tokens(model, numbers)))
    else:
        print(json.dumps(_measure_overhead(model, int(numbers[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
