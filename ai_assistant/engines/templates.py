"""Chat templates: messages to the text that a model was trained on. A template is hostile input.

Templates are Jinja programs inside the model file. Jinja's sandbox keeps them from Python's insides,
but not from running for ever or from building gigabytes. Stopping a thread from outside is not possible
in Python and a process per request would cost more than the whole answer may, so the limits are put
into the program itself: the syntax tree gets a counter into every loop and macro, and everything that
can multiply the length of a value is checked before or after it does. The counter sees the clock too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ai_assistant.engines.tools import describe
from ai_assistant.errors import InvalidArgument, InvalidModel

MAX_TEMPLATE = 512 << 10
"""Characters of a template's source. The longest known one has 30,000."""
MAX_TEXT = 16 << 20
"""Characters of any value that a template makes, and of its output."""
MAX_STEPS = 500_000
MAX_SECONDS = 3.0
MAX_RANGE = 100_000
MAX_NODES = 200_000
"""Values in a list or object, counted as often as they are reachable: `[x, x]` doubles them."""
_UNAVAILABLE = (
    "center", "pprint", "filesizeformat", "urlize", "wordwrap", "xmlattr", "random", "slice", "batch", "format",
)  # fmt: skip
"""Filters that grow text or have no place in a prompt."""
_GROWING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})

FALLBACK = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, which most instruction-tuned models without a template of their own have seen."""


class TemplateLimit(InvalidModel):
    """The template does too much work; a defect of the model, not of the request."""

    @property
    def name(self) -> str:
        return "InvalidModel"


class _Refused(Exception):
    """`raise_exception` of a template: it does not accept these messages."""


class _Budget:
    def __init__(self) -> None:
        self.steps = 0
        self.until = time.monotonic() + MAX_SECONDS

    def step(self) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS or time.monotonic() > self.until:
            raise TemplateLimit("the model's chat template runs too long")
        return ""


class _Generation(Extension):
    """`{% generation %}`: marks what training counts as the answer. Means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for each in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            body: list[nodes.Node] = getattr(each, "body")  # noqa: B009
            body.insert(0, _count(each.lineno))
        _replace_growing(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    _check_length(len(value) * max(count, 0))
        if operator == "**" and (not isinstance(right, int | float) or abs(right) > 64 or abs(left) > 1 << 32):
            raise TemplateLimit("the model's chat template computes absurd powers")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name in _GROWING and any(isinstance(each, int) and each > MAX_RANGE for each in args):
                raise TemplateLimit("the model's chat template pads text absurdly")
            if name == "replace" and len(args) >= 2:
                _check_length(_replaced_length(owner, str(args[0]), str(args[1])))
            if name == "join" and args:
                _check_length(len(owner) * _count_of(args[0]))
        return _checked(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(str(value.__self__))
        return wrapped


def _count(line: int) -> nodes.Node:
    return nodes.ExprStmt(nodes.Call(nodes.Name("__step__", "load"), [], [], None, None)).set_lineno(line)


def _replace_growing(tree: nodes.Template) -> None:
    """Turn `a ~ b`, `[…]`, `(…)` and `{…}` into calls that check, since Jinja does not let the sandbox see them."""
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Node):
                setattr(parent, field, _watched(parent, value))
            elif isinstance(value, list):
                value[:] = [_watched(parent, each) for each in value]


def _watched(parent: nodes.Node, node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        name, arguments = "__concat__", list(node.nodes)
    elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        name, arguments = "__weigh__", [node]
        if isinstance(parent, nodes.Call) and isinstance(parent.node, nodes.Name) and parent.node.name == name:
            return node
    else:
        return node
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None).set_lineno(node.lineno)


def _check_format(pattern: str) -> None:
    # A width may be written out, or taken from an argument: neither may be large.
    if re.search(r"\d{4}|\*|:[^}]*\{", pattern):
        raise TemplateLimit("the model's chat template formats text absurdly")


def _weigh(value: Any) -> Any:
    """The value itself, if it has at most MAX_NODES values and MAX_TEXT characters inside."""
    count = length = 0
    todo = [value]
    while todo:
        each = todo.pop()
        count += 1
        if isinstance(each, str):
            length += len(each)
        elif isinstance(each, list | tuple):
            count += len(each)
            todo.extend(each[: MAX_NODES - count + 1] if count < MAX_NODES else ())
        elif isinstance(each, dict):
            count += len(each)
            todo.extend(each.values() if count < MAX_NODES else ())
        if count > MAX_NODES or length > MAX_TEXT:
            raise TemplateLimit("the model's chat template makes absurdly large values")
    return value


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise TemplateLimit("the model's chat template makes absurdly long text")


def _checked(value: Any) -> Any:
    if isinstance(value, str | bytes):
        _check_length(len(value))
    elif isinstance(value, list | tuple | dict):
        _weigh(value)
    return value


def _count_of(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else MAX_RANGE


def _replaced_length(text: str, old: str, new: str) -> int:
    if len(new) <= len(old):
        return len(text)
    count = text.count(old) if old else len(text) + 1
    return len(text) + count * (len(new) - len(old))


def _concat(*parts: Any) -> str:
    texts = [str(_checked(each)) for each in parts]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _raise_exception(message: Any = "") -> None:
    raise _Refused(str(message)[:500])


def _range(*arguments: int) -> range:
    found = range(*arguments)
    if len(found) > MAX_RANGE:
        raise TemplateLimit("the model's chat template counts absurdly far")
    return found


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    if isinstance(indent, int) and indent > 16:
        indent = 16
    _weigh(value)
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: Any) -> str:
    return datetime.now().astimezone().strftime(str(pattern)[:200])


def _replace_filter(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    before, old, new = str(text), str(old), str(new)
    _check_length(_replaced_length(before, old, new))
    return before.replace(old, new, -1 if count is None else count)


def _join_filter(values: Any, separator: Any = "", attribute: Any = None) -> str:
    items = list(values)
    if attribute is not None:
        items = [each.get(attribute, "") if isinstance(each, Mapping) else "" for each in items]
    texts, between = [str(each) for each in _weigh(items)], str(separator)
    _check_length(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def _indent_filter(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    fill = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = str(text).splitlines(keepends=True) or [""]
    _check_length(len(str(text)) + len(fill) * len(lines))
    return "".join(
        fill + line if (first or number) and (blank or line.strip()) else line for number, line in enumerate(lines)
    )


def _string_filter(value: Any) -> str:
    return str(_checked(value))


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], autoescape=False, cache_size=0,
        finalize=_checked,
    )  # fmt: skip
    environment.globals.clear()
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, range=_range, __concat__=_concat,
        __weigh__=_weigh, namespace=_namespace(), dict=dict,
    )  # fmt: skip
    environment.filters.update(tojson=_tojson, replace=_replace_filter, join=_join_filter)
    environment.filters.update(string=_string_filter, indent=_indent_filter)
    for name in _UNAVAILABLE:
        environment.filters.pop(name, None)
    return environment


def _namespace() -> Any:
    from jinja2.utils import Namespace

    return Namespace


class ChatTemplate:
    """A compiled template. Rendering may be done from any thread.

    Args:
        source: the template, "" for the fallback.
        bos, eos: the texts of the special tokens.

    Raises:
        InvalidModel: the template is no Jinja, or far too long.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source) > MAX_TEMPLATE:
            raise InvalidModel(f"the chat template is {len(source)} characters long, more than {MAX_TEMPLATE}")
        self.is_own = bool(source)
        self._knows_tools = "tools" in source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = _environment().from_string(source or FALLBACK)
        except TemplateSyntaxError as error:
            raise InvalidModel(f"the chat template does not compile: {error.message}, line {error.lineno}") from error
        except (TemplateError, RecursionError, ValueError, OverflowError, SyntaxError, MemoryError) as error:
            raise InvalidModel(f"the chat template does not compile: {type(error).__name__}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt for these messages, with the beginning of the answer.

        Args:
            functions: the `function` objects of the tools that the model may call.

        Raises:
            InvalidArgument: the template does not accept these messages, in its own words.
            InvalidModel: the template fails or does too much work.
        """
        conversation = [_plain(each, index) for index, each in enumerate(messages)]
        if functions and not self._knows_tools:
            conversation = _with_system(conversation, describe(functions))
        budget = _Budget()
        variables: dict[str, Any] = {
            "messages": conversation,
            "tools": [{"type": "function", "function": dict(each)} for each in functions] or None,
            "documents": None,
            "add_generation_prompt": True,
            "__step__": budget.step,
            **self._tokens,
        }
        try:
            return self._collect(variables)
        except _Refused as error:
            raise InvalidArgument(f"the model's chat template refuses: {error}", param="messages") from error
        except InvalidModel:
            raise
        except (MemoryError, RecursionError) as error:
            raise TemplateLimit("the model's chat template needs too much memory") from error
        except Exception as error:
            # Whatever a template does wrong comes out of Jinja as any exception at all.
            raise InvalidModel(f"the model's chat template fails: {type(error).__name__}: {error}"[:400]) from error

    def _collect(self, variables: dict[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        for part in self._template.generate(variables):
            length += len(part)
            _check_length(length)
            parts.append(part)
        return "".join(parts)


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as templates know it: content is text, tool arguments are objects."""
    where = f"messages[{index}]"
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidArgument(f"{where}.role must be system, user, assistant or tool", param=f"{where}.role")
    out = {key: value for key, value in message.items() if value is not None}
    out["role"] = role
    out["content"] = _content(message.get("content"), where)
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidArgument(f"{where}.tool_calls must be a list", param=f"{where}.tool_calls")
        out["tool_calls"] = [_call(each, where) for each in calls]
    return out


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    param = f"{where}.content"
    if not isinstance(content, Sequence):
        raise InvalidArgument(f"{param} must be text or a list of text parts", param=param)
    texts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidArgument(f"{param} may have text parts only; this model reads nothing else", param=param)
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidArgument(f"{where}.tool_calls has an entry without a function", param=f"{where}.tool_calls")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidArgument(f"{where}.tool_calls has arguments that are no JSON", param=where) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
