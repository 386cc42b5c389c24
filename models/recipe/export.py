"""Export to GGUF: architecture `llama`, byte-level BPE with the `qwen2` splitter, Q8_0 matrices.

The file carries the chat template, the version and the fingerprint of the actions it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ai_assistant.actions.catalogue import ACTIONS, NONE, fingerprint
from ai_assistant.models.recipe.evaluate import load_network
from ai_assistant.models.recipe.tokenizer import END, SPECIAL

NAME = "assistant"
VERSION = "1"
CREATED = 1_795_305_600
"""Seconds since 1970, fixed, so that the same weights give the same file."""
MAX_BYTES = 10_000_000
ACTIONS_KEY = "ai_assistant.actions"
FINGERPRINT_KEY = "ai_assistant.actions_sha256"

# The word "tools" in it tells the engine that the template knows of tools: this model has its actions in
# its weights, and a list of definitions in the prompt would only be noise to it.
TEMPLATE = (
    "{#- tools: the actions are in the weights; a grammar restricts the call -#}"
    "{%- for message in messages -%}"
    "<|{{ message.role if message.role in ['system', 'user', 'assistant', 'tool'] else 'user' }}|>"
    "{%- if message.tool_calls -%}"
    "{%- for call in message.tool_calls -%}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{%- endfor -%}"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def export(work: Path, target: Path) -> None:
    """Write `target` (a .gguf) and the .json beside it from `work`/weights.pt.

    Raises:
        ValueError: the file would be larger than the repository allows.
    """
    import gguf

    network, tokenizer = load_network(work)
    shape = network.shape
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name(NAME)
    writer.add_version(VERSION)
    writer.add_license("apache-2.0")
    writer.add_description("Turns a sentence into one of the appliance's own actions")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, tokenizer)
    writer.add_chat_template(TEMPLATE)
    writer.add_array(ACTIONS_KEY, [*(each.name for each in ACTIONS), NONE])
    writer.add_string(FINGERPRINT_KEY, fingerprint())
    for name, values in _tensors(network):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = partial.stat().st_size
    if size > MAX_BYTES:
        partial.unlink()
        raise ValueError(f"the model is {size} bytes large, more than {MAX_BYTES}")
    partial.replace(target)
    facts = {
        "name": f"{NAME}:{VERSION}",
        "version": VERSION,
        "created": CREATED,
        "license": "Apache-2.0",
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "size_bytes": size,
        "actions_sha256": fingerprint(),
    }
    target.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    print(f"export: {target.name} {size} bytes, sha256 {facts['sha256']}")


def write_parity(work: Path, target: Path) -> None:
    """What PyTorch makes of the hand-written questions, for the test that llama.cpp makes the same of them.

    One JSON object a line: the question as the model gets it, the prompt's tokens, and the log-probability
    of the token that begins each of the three likeliest calls.
    """
    from ai_assistant.models.recipe.cases import SETS, marked, read_cases
    from ai_assistant.models.recipe.evaluate import TorchPredictor
    from ai_assistant.models.recipe.tokenizer import prompt_ids

    network, tokenizer = load_network(work)
    predict = TorchPredictor(network, tokenizer)
    lines: list[str] = []
    for case in [each for name in SETS for each in read_cases(name)]:
        text = marked(case).text
        likeliest = sorted(predict.heads(text).items(), key=lambda each: -each[1])[:3]
        lines.append(json.dumps({
            "text": text,
            "tokens": prompt_ids(tokenizer, text),
            "calls": {name: round(value, 4) for name, value in likeliest},
        }, ensure_ascii=False))  # fmt: skip
    target.write_text("\n".join(lines) + "\n", "utf-8")


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    import gguf

    description = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = description["model"]["vocab"]
    tokens = {number: text for text, number in vocabulary.items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        control = added["content"] in SPECIAL
        kinds[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    order = sorted(tokens)
    assert order == list(range(len(order)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens[each] for each in order])
    writer.add_token_types([kinds[each] for each in order])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(END)
    writer.add_pad_token_id(END)
    writer.add_add_bos_token(False)


def _tensors(network: Any) -> list[tuple[str, Any]]:
    """llama.cpp's names. Without `output.weight` it uses the embeddings for the output too, as we do."""
    found = [("token_embd.weight", network.embedding.weight), ("output_norm.weight", network.norm.weight)]
    for i, block in enumerate(network.blocks):
        found += [
            (f"blk.{i}.attn_norm.weight", block.attention_norm.weight),
            (f"blk.{i}.attn_q.weight", block.query.weight),
            (f"blk.{i}.attn_k.weight", block.key.weight),
            (f"blk.{i}.attn_v.weight", block.value.weight),
            (f"blk.{i}.attn_output.weight", block.output.weight),
            (f"blk.{i}.ffn_norm.weight", block.feed_norm.weight),
            (f"blk.{i}.ffn_gate.weight", block.gate.weight),
            (f"blk.{i}.ffn_up.weight", block.up.weight),
            (f"blk.{i}.ffn_down.weight", block.down.weight),
        ]
    return [(name, values.detach().float().numpy()) for name, values in found]
