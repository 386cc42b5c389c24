"""Whether the llama engine can run a well-formed GGUF, what it is, and how much memory it takes.

The rules are llama.cpp's own assertions (which end a process) and divisions, read from the pinned
source: llama-model.cpp `load_hparams`, llama-vocab.cpp `load`, and the shapes that ggml asserts on.
What llama.cpp reports as an ordinary error, such as a missing tensor, is left to it.
"""

from __future__ import annotations

from ai_assistant.engines import memory
from ai_assistant.engines.contract import LoadOptions, ModelInfo
from ai_assistant.engines.ggml_types import can_be_weight
from ai_assistant.engines.gguf import Array, Gguf
from ai_assistant.engines.gguf_fields import head_width, integer, per_layer, text
from ai_assistant.engines.gguf_memory import shape_of
from ai_assistant.engines.memory import MemoryShape, cells_per_sequence
from ai_assistant.errors import InvalidModel

MAX_LAYERS = 512
MAX_EXPERTS = 1024
MAX_CONTEXT = 1 << 26
MAX_VOCABULARY = 1 << 21
_MAX_WIDTH = 1 << 20

__all__ = [
    "DECODERS", "ENCODERS", "MAX_CONTEXT", "RECURRENT", "cells_per_sequence", "check", "context_of",
    "estimate_memory_bytes", "kv_bytes", "kv_type_of", "memory_shape",
]  # fmt: skip

_ENCODERS = """
    bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding
    llama-embed
"""
ENCODERS = frozenset(_ENCODERS.split())
"""They make embeddings and no text."""
_RECURRENT = """
    mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h
    nemotron_h_moe qwen3next kimi-linear bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp deepseek4
    minimax-01
"""
RECURRENT = frozenset(_RECURRENT.split())
"""With a recurrent state, wholly or in part: a cached prefix can only be kept whole."""
_DECODERS = """
    llama llama4 deci falcon grok gpt2 gptneox mpt baichuan starcoder refact bloom stablelm qwen qwen2
    qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo plamo3 codeshell orion
    internlm2 minicpm minicpm3 gemma gemma2 gemma3 gemma3n gemma4 starcoder2 maple xverse command-r cohere2
    cohere2moe dbrx olmo olmo2 olmoe openelm arctic deepseek deepseek2 deepseek32 chatglm glm4 glm4moe
    glm-dsa bitnet jais jais2 nemotron exaone exaone4 exaone-moe granite granitemoe graniteswitch
    granite_swa chameleon plm bailingmoe bailingmoe2 dots1 dots3note arcee afmoe laguna ernie4_5
    ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 hy_v4 smollm3 gpt-oss smallthinker seed_oss
    grovemoe apertus hrm_text minimax-m2 minimax-m3 cogvlm pangu-embedded mistral3 mistral4 mimo2 step35
    spark2_5 maincoder talkie mellum nanbeige muse-glimmer
"""
DECODERS = RECURRENT | frozenset(_DECODERS.split())
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
_TOKENIZERS = ("llama", "bert", "gpt2", "t5", "rwkv", "plamo2", "gemma4")


def check(model: Gguf) -> ModelInfo:
    """Judge a parsed header.

    Raises:
        InvalidModel: the engine cannot run it, with the reason.
    """
    _check_kind(model)
    _check_shape(model)
    _check_experts(model)
    _check_tokenizer(model)
    architecture = model.architecture
    return ModelInfo(
        format="gguf",
        architecture=architecture,
        parameters=model.parameters,
        size_bytes=model.size_bytes,
        quantization=model.quantization,
        context_length=integer(model, "context_length"),
        has_chat_template=bool(model.chat_template),
        can_embed=architecture in ENCODERS or (architecture in DECODERS and architecture not in RECURRENT),
        name=text(model, "general.name")[:200],
    )


def _check_kind(model: Gguf) -> None:
    architecture = model.architecture
    if not architecture:
        raise InvalidModel("the file does not say what architecture it has")
    if text(model, "general.type") not in ("", "model"):
        raise InvalidModel(f"the file is not a whole model but of type {text(model, 'general.type')[:40]!r}")
    if model.integer("split.count", 0) > 1:
        raise InvalidModel(
            "the file is one part of a split model", hint="join the parts first: llama-gguf-split --merge"
        )
    if architecture not in DECODERS and architecture not in ENCODERS:
        raise InvalidModel(f"models of architecture {architecture[:40]!r} are not supported")


def _check_shape(model: Gguf) -> None:
    layers = integer(model, "block_count", high=MAX_LAYERS)
    width = integer(model, "embedding_length", high=_MAX_WIDTH)
    integer(model, "context_length", high=MAX_CONTEXT)
    heads = per_layer(model, "attention.head_count", layers, required=model.architecture not in RECURRENT)
    kv_heads = per_layer(model, "attention.head_count_kv", layers) or heads
    per_layer(model, "feed_forward_length", layers, high=1 << 24)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        length = integer(model, name, default=0, low=0, high=65_536)
        if length % 2:
            raise InvalidModel(f"{model.architecture}.{name} is {length}, which is odd")
    for position, (head, kv_head) in enumerate(zip(heads, kv_heads, strict=True)):
        if head and kv_head and head % kv_head:
            raise InvalidModel(f"layer {position} has {head} heads, no multiple of its {kv_head} key-value heads")
    one_head = head_width(model, width, heads)
    if heads and heads[0]:
        if model.of_model("attention.key_length") is None and width % heads[0]:
            raise InvalidModel(f"a width of {width} does not divide into {heads[0]} heads")
        if one_head < 1 or one_head % 2:
            raise InvalidModel(f"heads are {one_head} wide, which is not a positive even number")
        if integer(model, "rope.dimension_count", default=0, low=0) > one_head:
            raise InvalidModel("more dimensions are rotated than a head has")
    scaling = model.of_model("rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        raise InvalidModel(f"the rope scaling type {str(scaling)[:40]!r} is unknown")
    for each in model.tensors.values():
        if len(each.shape) > 1 and not can_be_weight(each.type):
            raise InvalidModel(f"tensor {each.name!r} is of type {each.type.name}, which cannot be a weight")


def _check_experts(model: Gguf) -> None:
    experts = integer(model, "expert_count", default=0, low=0, high=MAX_EXPERTS)
    layers = integer(model, "block_count")
    used = max(per_layer(model, "expert_used_count", layers, high=MAX_EXPERTS), default=0)
    groups = integer(model, "expert_group_count", default=0, low=0, high=MAX_EXPERTS)
    group_used = integer(model, "expert_group_used_count", default=0, low=0, high=MAX_EXPERTS)
    if used > experts or (experts and not used):
        raise InvalidModel(f"{used} of {experts} experts cannot be in use")
    if groups and (groups >= experts or (groups > 1 and (experts % groups or not 0 < group_used < groups))):
        raise InvalidModel(f"{experts} experts in {groups} groups, {group_used} in use, cannot be")
    if integer(model, "nextn_predict_layers", default=0, low=0) > layers:
        raise InvalidModel("there are more prediction layers than layers")


def _check_tokenizer(model: Gguf) -> None:
    kind = text(model, "tokenizer.ggml.model")
    if kind not in _TOKENIZERS:
        raise InvalidModel(f"the tokenizer {kind[:40]!r} is not supported" if kind else "the file has no tokenizer")
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Array) or tokens.type != 8 or not 1 <= tokens.count <= MAX_VOCABULARY:
        raise InvalidModel("the tokenizer has no usable list of tokens")
    for name in ("scores", "token_type"):
        array = model.metadata.get(f"tokenizer.ggml.{name}")
        if array is not None and (not isinstance(array, Array) or array.count != tokens.count):
            raise InvalidModel(f"the tokenizer's {name} do not match its {tokens.count} tokens")
    embedding = model.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidModel("the model has no token embedding")
    width = integer(model, "embedding_length")
    if embedding.shape != (width, tokens.count):
        raise InvalidModel(f"the token embedding is {embedding.shape}, but there are {tokens.count} tokens of {width}")
    for name in ("bos", "eos"):
        # Adding a special token that does not exist is an assertion in llama.cpp.
        wanted = model.metadata.get(f"tokenizer.ggml.add_{name}_token", False)
        default = {"llama": 2, "bert": 103, "gpt2": 11}.get(kind, 0)
        if wanted and f"tokenizer.ggml.{name}_token_id" not in model.metadata and default >= tokens.count:
            raise InvalidModel(f"the tokenizer adds a {name} token, but there is none")
    if kind in ("llama", "bert", "plamo2") and tokens.count < 4:
        raise InvalidModel(f"a {kind} tokenizer of {tokens.count} tokens cannot be")


def memory_shape(model: Gguf) -> MemoryShape:
    """What the model's memory depends on; for headers that `check` has accepted."""
    return shape_of(model, encoder=model.architecture in ENCODERS)


def context_of(model: Gguf, options: LoadOptions) -> int:
    """Tokens per sequence that a load with these options gives; see `memory.settle`."""
    return memory.settle(memory_shape(model), options).context_length


def kv_type_of(model: Gguf, options: LoadOptions) -> str:
    """Elements of the cache that a load with these options gives: f16, q8_0 or q4_0; see `memory.settle`."""
    return memory.settle(memory_shape(model), options).kv_type


def estimate_memory_bytes(model: Gguf, options: LoadOptions | None = None) -> int:
    """What a worker with this model takes, in bytes; `memory.estimate` has the parts."""
    return memory.estimate(memory_shape(model), options or LoadOptions()).total_bytes


def kv_bytes(model: Gguf, options: LoadOptions) -> int:
    """The key-value cache for all sequences together, in bytes."""
    return memory.kv_bytes(memory_shape(model), options)
