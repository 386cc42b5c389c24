"""``python -m ai_assistant.models.recipe STEP``: tokenizer, train, evaluate, export, or all of them in order."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

STEPS = ("tokenizer", "train", "evaluate", "export")
ROOM = Path(__file__).parents[1]


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant" / "model"
    parser = argparse.ArgumentParser(prog="python -m ai_assistant.models.recipe", description=__doc__)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--work", type=Path, default=cache / recipe_key(), help="checkpoints and the tokenizer")
    parser.add_argument("--out", type=Path, default=ROOM / "assistant-1.gguf", help="where the GGUF goes")
    parser.add_argument("--steps", type=int, default=0, help="training steps instead of the recipe's")
    chosen = parser.parse_args()
    for step in STEPS if chosen.step == "all" else (chosen.step,):
        run(step, chosen.work, chosen.out, chosen.steps)


def recipe_key() -> str:
    """Names the recipe's state: another recipe never resumes this one's checkpoints."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".txt"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run(step: str, work: Path, out: Path, steps: int) -> None:
    # PyTorch takes seconds to import and is not needed for every step.
    work.mkdir(parents=True, exist_ok=True)
    if step == "tokenizer":
        from ai_assistant.models.recipe.tokenizer import train_tokenizer

        if not (work / "tokenizer.json").exists():
            train_tokenizer(work / "tokenizer.json")
    elif step == "train":
        from ai_assistant.models.recipe.train import STEPS as DEFAULT
        from ai_assistant.models.recipe.train import train

        train(work, steps=steps or DEFAULT)
    elif step == "evaluate":
        from ai_assistant.models.recipe.evaluate import evaluate

        evaluate(work)
    else:
        from ai_assistant.models.recipe.export import export, write_parity

        export(work, out)
        write_parity(work, out.with_suffix(".parity.jsonl"))


if __name__ == "__main__":
    main()
