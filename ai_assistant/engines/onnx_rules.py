"""Judges whether an ONNX package is a model that this engine runs, and what it can do.

What is in the configuration files decides how vectors are made of what the graph computes, so a setting that is
not known is refused by name: a model that answers with the wrong pooling is worse than one that does not answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ai_assistant.engines.contract import LoadOptions, ModelInfo
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.engines.onnx_file import FLOAT, FLOAT16, INT32, INT64, OnnxFile, Value, read_onnx
from ai_assistant.engines.onnx_package import MODEL, NEEDED, Package
from ai_assistant.engines.onnx_tokenizer import MAX_BYTES as MAX_TOKENIZER_BYTES
from ai_assistant.engines.onnx_tokenizer import Tokenizer
from ai_assistant.errors import InvalidModel, NotSupported

MAX_CONFIG_BYTES = 1 << 20
MAX_LENGTH = 8192
"""Tokens of a text. Attention grows with its square."""
MAX_LABELS = 1000
_LEAST_LENGTH = 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_MODULES = ("Transformer", "Pooling", "Normalize")
_RUNTIME_BYTES = 110 << 20


class Task(StrEnum):
    EMBED = "embed"
    RERANK = "rerank"
    CLASSIFY = "classify"


class Pooling(StrEnum):
    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    NONE = "none"
    """The graph makes one vector by itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to run a model. Lengths in tokens."""

    task: Task
    output: Value
    inputs: tuple[Value, ...]
    pooling: Pooling
    length: int
    """Most tokens of a text, or of a pair, special ones included."""
    labels: tuple[str, ...] = ()
    independent: bool = False
    """Each label has a probability of its own (sigmoid); otherwise all of them sum up to 1 (softmax)."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A package that was accepted."""

    file: OnnxFile
    tokenizer: Tokenizer
    plan: Plan
    info: ModelInfo
    memory: MemoryShape


def check(package: Package) -> Checked:
    """Judge all files of a package; no native code sees any of them.

    Raises:
        InvalidModel: something is damaged or does not fit together.
        NotSupported: it is sound, and of a kind that is not run here.
    """
    for name in NEEDED[1:]:
        package.member(name)
    config = _json(package, "config.json")
    data = package.read("tokenizer.json", MAX_TOKENIZER_BYTES)
    assert data is not None
    tokenizer = Tokenizer(data)
    file = read_onnx(package.member(MODEL))
    inputs = _inputs(file)
    output = _output(file)
    task = _task(output, config)
    plan = Plan(
        task,
        output,
        inputs,
        _pooling(package) if len(output.shape) == 3 else Pooling.NONE,
        _length(package, config),
        _labels(config, output) if task is Task.CLASSIFY else (),
        config.get("problem_type") == "multi_label_classification",
    )
    if max(tokenizer.added, tokenizer.added_to_pair) + _LEAST_LENGTH > plan.length:
        raise InvalidModel(f"a length of {plan.length} tokens leaves no room for text")
    vocabulary = _number(config, "vocab_size", tokenizer.size, 1, 1 << 24)
    if tokenizer.size > vocabulary:
        raise InvalidModel(f"the tokenizer has {tokenizer.size} tokens, the model {vocabulary}")
    architecture = config.get("model_type")
    info = ModelInfo(
        format="onnx",
        architecture=architecture[:64] if isinstance(architecture, str) else "unknown",
        parameters=file.parameters,
        size_bytes=package.size,
        quantization=file.quantization,
        context_length=plan.length,
        has_chat_template=False,
        can_embed=task is Task.EMBED,
        can_generate=False,
        can_rerank=task is Task.RERANK,
        can_classify=task is Task.CLASSIFY,
    )
    return Checked(file, tokenizer, plan, info, _memory(file, config, plan))


def _inputs(file: OnnxFile) -> tuple[Value, ...]:
    names = [each.name for each in file.inputs]
    for each in file.inputs:
        if each.name not in _INPUTS:
            raise NotSupported(
                f"the graph wants the input {each.name[:60]!r}",
                hint="models that read texts of tokens work: BERT and its kin",
            )
        if each.type not in (INT32, INT64) or len(each.shape) != 2:
            raise InvalidModel(f"the input {each.name!r} is no table of whole numbers")
        if any(length is not None and length != 1 for length in each.shape[1:]) or each.shape[0] not in (None, 1):
            raise NotSupported(
                f"the input {each.name!r} has the fixed shape {each.shape}", hint="export the model with dynamic axes"
            )
    if "input_ids" not in names or "attention_mask" not in names or len(set(names)) != len(names):
        raise InvalidModel("the graph lacks the inputs input_ids and attention_mask")
    return tuple(file.inputs)


def _output(file: OnnxFile) -> Value:
    """The output to use: one that is a vector of a text by its name, else the first."""
    if not file.outputs:
        raise InvalidModel("the graph has no output")
    named = {each.name: each for each in file.outputs}
    found = next((named[each] for each in ("logits", "sentence_embedding") if each in named), file.outputs[0])
    if found.type not in (FLOAT, FLOAT16) or len(found.shape) not in (2, 3):
        raise InvalidModel(f"the output {found.name[:60]!r} is no table of numbers, one or more rows a text")
    width = found.shape[-1]
    if width is not None and not 1 <= width <= 1 << 16:
        raise InvalidModel(f"the output {found.name[:60]!r} has the absurd width {width}")
    return found


def _task(output: Value, config: Mapping[str, Any]) -> Task:
    kinds = config.get("architectures")
    kind = str(kinds[0]) if isinstance(kinds, list) and kinds else ""
    if not kind.endswith("ForSequenceClassification"):
        if output.name == "logits":
            raise NotSupported(
                f"models of the kind {kind[:60] or 'unknown'} are not run",
                hint="those that make vectors, rank or classify whole texts are",
            )
        return Task.EMBED
    if len(output.shape) != 2:
        raise InvalidModel(f"a model that judges whole texts has one row for each; {output.name[:60]!r} has more")
    return Task.RERANK if _label_count(config, output) == 1 else Task.CLASSIFY


def _label_count(config: Mapping[str, Any], output: Value) -> int:
    names = config.get("id2label")
    count = len(names) if isinstance(names, dict) and names else _number(config, "num_labels", 0, 0, MAX_LABELS)
    width = output.shape[-1]
    if count == 0:
        # What the library that writes these files takes where they say nothing.
        count = width or 2
    if not 1 <= count <= MAX_LABELS or (width is not None and width != count):
        raise InvalidModel(f"the model has {count} labels, its output {width}")
    return count


def _labels(config: Mapping[str, Any], output: Value) -> tuple[str, ...]:
    count = _label_count(config, output)
    names = config.get("id2label")
    if config.get("problem_type") == "regression":
        raise NotSupported("the model measures several things at once and has no labels")
    if not isinstance(names, dict) or not names:
        return tuple(f"LABEL_{number}" for number in range(count))
    found = [names.get(str(number)) for number in range(count)]
    if any(not isinstance(each, str) or not each or len(each) > 256 for each in found) or len(set(found)) != count:
        raise InvalidModel("the labels in config.json (id2label) are not one text for each number")
    return tuple(map(str, found))


def _pooling(package: Package) -> Pooling:
    modules = _optional(package, "modules.json")
    if modules is not None:
        if not isinstance(modules, list) or any(not isinstance(each, dict) for each in modules):
            raise InvalidModel("modules.json is no list of modules")
        for each in modules:
            kind = str(each.get("type", "")).rpartition(".")[2]
            if kind not in _MODULES:
                raise NotSupported(f"the model has a step {kind[:60]!r} that is not in the graph, and not done here")
    settings = _optional(package, "1_Pooling/config.json")
    if settings is None:
        return Pooling.MEAN
    if not isinstance(settings, dict):
        raise InvalidModel("1_Pooling/config.json is not a JSON object")
    modes = [
        key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
    ]
    known = {"mean_tokens": Pooling.MEAN, "cls_token": Pooling.CLS, "lasttoken": Pooling.LAST}
    if len(modes) != 1 or modes[0] not in known:
        raise NotSupported(
            f"pooling by {', '.join(modes)[:80] or 'nothing'} is not done here; one of {', '.join(known)} is"
        )
    return known[modes[0]]


def _length(package: Package, config: Mapping[str, Any]) -> int:
    """The shortest of what the files say; some say absurdly much for "no limit"."""
    found = [MAX_LENGTH]
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
        ("sentence_bert_config.json", "max_seq_length"),
    ):
        values = config if name == "config.json" else _optional(package, name)
        value = values.get(key) if isinstance(values, Mapping) else None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
            raise InvalidModel(f"{key} in {name} is {str(value)[:40]}, no length")
        found.append(int(min(value, MAX_LENGTH)))
    return min(found)


def _memory(file: OnnxFile, config: Mapping[str, Any], plan: Plan) -> MemoryShape:
    width = _number(config, "hidden_size", 768, 1, 1 << 16)
    hidden = _number(config, "intermediate_size", 4 * width, 1, 1 << 20)
    heads = _number(config, "num_attention_heads", 12, 1, 1 << 12)
    # A batch has as many tokens as a step, or one long text: its scores, and what lies between two layers.
    tokens = max(plan.length, LoadOptions().batch_tokens)
    batch = 4 * tokens * (2 * heads * plan.length + 6 * width + 2 * hidden)
    # While it is loaded, the file's bytes and the parsed message lie beside the weights of the session.
    return MemoryShape(
        weights_bytes=file.size_bytes, compute_bytes=2 * file.size_bytes + batch, runtime_bytes=_RUNTIME_BYTES
    )


def _number(values: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidModel(f"{key} in config.json is {str(value)[:40]}, not a number from {low} to {high}")
    return value


def _json(package: Package, name: str) -> dict[str, Any]:
    values = _optional(package, name)
    if not isinstance(values, dict):
        raise InvalidModel(f"{name} is not a JSON object")
    return values


def _optional(package: Package, name: str) -> Any:
    if name in package.members:
        package.member(name)
    data = package.read(name, MAX_CONFIG_BYTES)
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidModel(f"{name} is damaged: it is no JSON", hint="download it again") from None
