"""Chat templates: messages to the text that a model was trained on. A template is hostile input.

Templates are Jinja programs inside the model file. Jinja's sandbox keeps them from Python's insides,
but not from running for ever or from building gigabytes. Stopping a thread from outside is not possible
in Python and a process per request would cost more than the whole answer may, so the limits are put
into the program itself: the syntax tree gets a counter into every loop and macro; filters, methods and
operators look at the clock before they work and at the size of what they made; and what could take long
or grow much in a single call is limited or missing. Nothing is computed when a template is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ai_assistant.engines import template_filters as filters
from ai_assistant.engines.messages import plain_message
from ai_assistant.engines.template_limits import (
    BUDGET,
    MAX_RANGE,
    TemplateLimit,
    check_format,
    check_integers,
    check_length,
    check_method,
    checked,
    tick,
    weigh,
)
from ai_assistant.engines.tools import describe
from ai_assistant.engines.user_text import Piece, Specials, render_apart
from ai_assistant.errors import InvalidArgument, InvalidModel

MAX_TEMPLATE = 512 << 10
"""Characters of a template's source. The longest known one has 30,000."""
FALLBACK = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, which most instruction-tuned models without a template of their own have seen."""


class _Refused(Exception):
    """`raise_exception` of a template: it does not accept these messages."""


class _Generation(Extension):
    """`{% generation %}`: marks what training counts as the answer. Means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for each in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            body: list[nodes.Node] = getattr(each, "body")  # noqa: B009
            body.insert(0, _count(each.lineno))
        _replace_growing(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        tick()
        check_integers(operator, left, right)
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    check_length(len(value) * max(count, 0))
        if operator == "%" and isinstance(left, str):
            check_format(left, (right,))
        return checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        tick()
        check_method(obj, args, kwargs)
        return checked(super().call(context, obj, *args, **kwargs))

    def concat(self, parts: Iterable[str]) -> str:
        """What macros and `{% set %}` blocks put together; Jinja calls it with strings only."""
        texts: list[str] = []
        length = 0
        for each in parts:
            length += len(each)
            check_length(length)
            texts.append(each)
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern = str(value.__self__)

        def call(*args: Any, **kwargs: Any) -> Any:
            check_format(pattern, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return call


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


def _concat(*parts: Any) -> str:
    texts = [str(checked(each)) for each in parts]
    check_length(sum(map(len, texts)))
    return "".join(texts)


def _raise_exception(message: Any = "") -> None:
    raise _Refused(str(message)[:500])


def _range(*arguments: int) -> range:
    found = range(*arguments)
    if len(found) > MAX_RANGE:
        raise TemplateLimit("the model's chat template counts absurdly far")
    return found


def _strftime_now(pattern: Any) -> str:
    return datetime.now().astimezone().strftime(str(pattern)[:200])


class _Namespace(Namespace):
    def __repr__(self) -> str:
        # Jinja's prints what is inside, and namespaces may hold each other many times over.
        return "<namespace>"


@pass_context
def _finalize(_context: Any, value: Any) -> Any:
    # With a context, Jinja cannot call this, nor what is printed, when it compiles.
    return checked(value)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], autoescape=False, cache_size=0,
        finalize=_finalize, optimized=False,
    )  # fmt: skip
    environment.globals.clear()
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, range=_range, __concat__=_concat,
        __weigh__=weigh, namespace=_Namespace, dict=dict,
    )  # fmt: skip
    environment.filters = filters.limited(environment.filters)
    return environment


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
        """The prompt as one text, which does not tell the model's control tokens from users' words; see `pieces`."""
        return "".join(each.text for each in self.pieces(messages, functions, Specials(())))

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]], specials: Specials
    ) -> list[Piece]:
        """The prompt for these messages, with the beginning of the answer, in pieces to be tokenised each by itself.

        Args:
            functions: the `function` objects of the tools that the model may call.
            specials: what must not become a token where a message or tool contains it.

        Raises:
            InvalidArgument: the template does not accept these messages, in its own words.
            InvalidModel: the template fails or does too much work.
        """
        conversation = [plain_message(each, index) for index, each in enumerate(messages)]
        return render_apart(self._render, (conversation, list(functions)), specials)

    def _render(self, values: tuple[list[dict[str, Any]], list[Mapping[str, Any]]]) -> str:
        conversation, functions = values
        if functions and not self._knows_tools:
            conversation = _with_system(conversation, describe(functions))
        variables: dict[str, Any] = {
            "messages": conversation,
            "tools": [{"type": "function", "function": dict(each)} for each in functions] or None,
            "documents": None,
            "add_generation_prompt": True,
            "__step__": BUDGET.step,
            **self._tokens,
        }
        try:
            with BUDGET.fresh():
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
            check_length(length)
            parts.append(part)
        return "".join(parts)


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
