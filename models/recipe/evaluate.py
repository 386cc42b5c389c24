"""The hand-written questions through the network in PyTorch, restricted as the grammar restricts it.

The figures of the model card come from the exported file in llama.cpp (tests/models); this is the same
measurement without the export, to see where training stands.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ai_assistant.actions.catalogue import ACTIONS, NONE
from ai_assistant.actions.text import Marked
from ai_assistant.models.recipe.cases import SETS, Answer, Score, read_cases, score, with_names
from ai_assistant.models.recipe.network import Network, Shape
from ai_assistant.models.recipe.tokenizer import load_tokenizer, prompt_ids


def load_network(work: Path) -> tuple[Any, Any]:
    """The trained network, ready to answer, and its tokenizer."""
    tokenizer = load_tokenizer(work / "tokenizer.json")
    network = Network(Shape(vocabulary=tokenizer.get_vocab_size()))
    network.load_state_dict(torch.load(work / "weights.pt", weights_only=True))
    network.eval()
    return network, tokenizer


class TorchPredictor:
    """Greedy choice among the calls that the tools allow; probabilities are over the whole vocabulary."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._heads = {name: self._one(f'{{"name": "{name}", "arguments": {{')
                       for name in (*(each.name for each in ACTIONS), NONE)}  # fmt: skip
        self._parameters = {each.name: each.parameters for each in ACTIONS}

    def _one(self, text: str) -> int:
        (token,) = self._tokenizer.encode(text).ids
        return int(token)

    def heads(self, text: str) -> dict[str, float]:
        """Log-probability of the token that begins a call of each action."""
        first = self._logprobs(prompt_ids(self._tokenizer, text))
        return {name: first[token] for name, token in self._heads.items()}

    def __call__(self, question: Marked) -> Answer:
        ids = prompt_ids(self._tokenizer, question.text)
        first = self._logprobs(ids)
        action = max(self._heads, key=lambda name: first[self._heads[name]])
        total = first[self._heads[action]]
        ids = [*ids, self._heads[action]]
        second = self._logprobs(ids)
        arguments: dict[str, str] = {}
        if not self._parameters.get(action):
            total += second[self._one("}}")]
        for parameter in self._parameters.get(action, ()):
            values = parameter.values or question.choices(parameter.live)
            tails = {
                value: self._one(f'"{parameter.name}": "{value}"}}}}')
                for value in values
                if self._known(parameter.name, value)
            }
            best = max(tails, key=lambda value: second[tails[value]])
            arguments[parameter.name] = best
            total += second[tails[best]]
        return Answer(action, with_names(arguments, question), math.exp(total))

    def _known(self, name: str, value: str) -> bool:
        return len(self._tokenizer.encode(f'"{name}": "{value}"}}}}').ids) == 1

    def _logprobs(self, ids: list[int]) -> list[float]:
        with torch.no_grad():
            hidden = self._network.hidden(torch.tensor([ids]))[0, -1]
            values: list[float] = torch.log_softmax(self._network.logits(hidden).float(), -1).tolist()
        return values


def evaluate(work: Path) -> dict[str, Score]:
    """Print and return the scores of all sets."""
    torch.set_num_threads(1)
    predict = TorchPredictor(*load_network(work))
    scores = {name: score(read_cases(name), predict) for name in SETS}
    for name, each in scores.items():
        print(f"evaluate: {name} {json.dumps(each.summary())}")
    # Only the development set's mistakes are shown: phrases must not be fitted to the test set.
    print("\n".join(scores["dev"].mistakes))
    return scores
