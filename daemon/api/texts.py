"""Bodies of the endpoints that read texts and tokens without generating: checked, with the paths of mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ai_assistant.daemon.api import params
from ai_assistant.engines.hetero import PARAM, Wish
from ai_assistant.errors import InvalidArgument, NotSupported

MAX_DOCUMENTS = 2048
MAX_TEXTS = 2048
MAX_TOKENS = 65_536
MAX_CONTENT_BYTES = 1 << 20
"""Longer than any context; a text that is built to be hard to split takes long beyond that."""
_MAX_TOKEN = 2**31 - 1
_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RerankRequest:
    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None
    return_documents: bool
    keep_alive_s: float | None = None
    wish: Wish | None = None


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    model: str
    texts: tuple[str, ...]
    keep_alive_s: float | None = None
    wish: Wish | None = None


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    model: str
    content: str
    with_pieces: bool


def parse_rerank(body: Mapping[str, Any]) -> RerankRequest:
    """The shape that Cohere and Jina share.

    Raises:
        InvalidArgument: with the parameter's path.
    """
    known = frozenset({"model", "query", "documents", "top_n", "return_documents", "keep_alive", PARAM})
    params.check_names(body, known, frozenset({"user"}))
    model, query = params.text(body, "model"), params.text(body, "query")
    given = body.get("documents")
    if not isinstance(given, list) or not given:
        raise InvalidArgument("documents must be a list of texts", param="documents")
    if len(given) > MAX_DOCUMENTS:
        raise InvalidArgument(f"documents takes at most {MAX_DOCUMENTS} texts", param="documents")
    documents = tuple(_document(each, f"documents[{index}]") for index, each in enumerate(given))
    top_n = body.get("top_n")
    if top_n is not None and params.integer(top_n, "top_n") < 1:
        raise InvalidArgument("top_n must be at least 1", param="top_n")
    wanted = params.flag(body, "return_documents")
    keep, wish = params.keep_alive(body), Wish.of(body.get(PARAM))
    return RerankRequest(model, query, documents, top_n, wanted, keep, wish)


def _document(value: object, path: str) -> str:
    if isinstance(value, dict):
        text = value.get("text")
        if "image" in value:
            raise NotSupported(f"{path}: models here read text, not images", param=path)
        if len(value) != 1 or not isinstance(text, str):
            raise InvalidArgument(f'{path} must be a text, or {{"text": …}}', param=path)
        return text
    if not isinstance(value, str):
        raise InvalidArgument(f'{path} must be a text, or {{"text": …}}', param=path)
    return value


def parse_classify(body: Mapping[str, Any]) -> ClassifyRequest:
    """
    Raises:
        InvalidArgument, NotSupported: with the parameter's path.
    """
    params.check_names(body, frozenset({"model", "input", "labels", "keep_alive", PARAM}), frozenset({"user"}))
    model = params.text(body, "model")
    if body.get("labels") is not None:
        raise NotSupported("labels are the model's own", hint="leave labels out", param="labels")
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise InvalidArgument("input must be a string or a list of strings", param="input")
    if len(texts) > MAX_TEXTS:
        raise InvalidArgument(f"input takes at most {MAX_TEXTS} texts", param="input")
    for index, each in enumerate(texts):
        if not isinstance(each, str) or not each:
            raise InvalidArgument(f"input[{index}] must be a text", param=f"input[{index}]")
    return ClassifyRequest(model, tuple(texts), params.keep_alive(body), Wish.of(body.get(PARAM)))


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """
    Raises:
        InvalidArgument: with the parameter's name.
    """
    params.check_names(body, frozenset({"model", "content", "with_pieces"}), _NONE)
    model = params.text(body, "model")
    content = body.get("content")
    if not isinstance(content, str):
        raise InvalidArgument("content must be a string", param="content")
    if len(content) > MAX_CONTENT_BYTES:
        raise InvalidArgument(f"content takes at most {MAX_CONTENT_BYTES} characters", param="content")
    return TokenizeRequest(model, content, params.flag(body, "with_pieces"))


def parse_detokenize(body: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The model, and the tokens.

    Raises:
        InvalidArgument: with the parameter's path.
    """
    params.check_names(body, frozenset({"model", "tokens"}), _NONE)
    model = params.text(body, "model")
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise InvalidArgument("tokens must be a list of integers", param="tokens")
    if len(tokens) > MAX_TOKENS:
        raise InvalidArgument(f"tokens takes at most {MAX_TOKENS} integers", param="tokens")
    for index, each in enumerate(tokens):
        if not 0 <= params.integer(each, f"tokens[{index}]") <= _MAX_TOKEN:
            raise InvalidArgument(f"tokens[{index}] is no token", param=f"tokens[{index}]")
    return model, tuple(tokens)
