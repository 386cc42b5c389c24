"""JSON schema to GBNF, the grammar format of llama.cpp: what a schema forbids is then never sampled.

Every keyword is either enforced, or known to say nothing about validity (title, description, …), or
refused by name: an answer that only looks as if it had been checked would be worse than an error.
Size and depth are bounded, since a schema comes from a request.

The text may have a space after `:` and `,` (as `json.dumps` writes it) or line breaks with indentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ai_assistant.engines.grammar_numbers import integer_range
from ai_assistant.errors import InvalidArgument

MAX_DEPTH = 32
MAX_RULES = 4000
MAX_GRAMMAR = 256 << 10
MAX_ENUM = 4000
MAX_ALTERNATIVES = 128
MAX_CALLS = 16
"""Calls in one answer that a grammar forces."""
MAX_REPEAT = 1000
"""The library itself stops at 2000 repetitions, and writes a rule for each."""

_SILENT_WORDS = """
    $schema $id $comment $defs definitions title description default examples deprecated readOnly writeOnly
    format contentEncoding contentMediaType strict nullable
"""
_SILENT = frozenset(_SILENT_WORDS.split())
_BY_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_KEYWORDS = frozenset().union(*_BY_TYPE.values()) | {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}

_PRIMITIVES = {
    "ws": r'"" | " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "whole": r'"0" | [1-9] [0-9]{0,15}',
    "integer": r'"-"? whole',
    "number": r'"-"? whole ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": r'"[" ws (value ("," ws value)*)? ws "]"',
}
_NEEDS = {
    "string": ("char",), "integer": ("whole",), "number": ("whole",),
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "object": ("ws", "string", "value"), "array": ("ws", "value"),
}  # fmt: skip


def grammar_of(schema: Mapping[str, Any], *, param: str = "response_schema") -> str:
    """GBNF with the start symbol `root`. {} means any JSON object.

    Raises:
        InvalidArgument: the schema is wrong, too large, or uses what cannot be enforced.
    """
    converter = _Converter(param)
    return converter.text(converter.whole(schema if schema else {"type": "object"}))


def call_grammar(functions: Sequence[Mapping[str, Any]], *, parallel: bool, param: str = "tools") -> str:
    """GBNF for a call of one of `functions`, {"name": …, "arguments": …}, or with `parallel` also for a list of such.

    Raises:
        InvalidArgument: the schema of somebody's parameters is wrong, too large, or uses what cannot be enforced.
    """
    converter = _Converter(param)
    call = converter.call(functions)
    if not parallel:
        return converter.text(call)
    return converter.text(f'{call} | "[" ws {call} ("," ws {call}){{0,{MAX_CALLS - 1}}} ws "]"')


class _Converter:
    def __init__(self, param: str) -> None:
        self._root: Mapping[str, Any] = {}
        self._param = param
        self._rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._strings: dict[str, str] = {}
        self._count = 0
        self._length = 0

    def whole(self, schema: Mapping[str, Any]) -> str:
        """The rule of a schema to which its references relate."""
        self._root, self._references = schema, {}
        return self.visit(schema, ())

    def call(self, functions: Sequence[Mapping[str, Any]]) -> str:
        self._primitive("ws")
        ways: list[str] = []
        for function in functions:
            schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
            if not any(each in schema for each in ("type", "$ref", "anyOf", "oneOf", "allOf")):
                # A schema without a type is an object all the same: arguments always are.
                schema = {**schema, "type": "object"}
            ways.append(rf'{self._literal(function["name"])} "," ws "\"arguments\"" ":" ws {self.whole(schema)}')
        return self._rule(rf'"{{" ws "\"name\"" ":" ws ({" | ".join(ways)}) ws "}}"')

    def text(self, root: str) -> str:
        lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._rules.items())]
        out = "\n".join(lines)
        if len(out) > MAX_GRAMMAR:
            raise self._error("the schema is too large")
        return out

    def _error(self, message: str, path: Sequence[str] = ()) -> InvalidArgument:
        where = "/".join(path)
        return InvalidArgument(f"{message}{f' (at {where[:120]})' if where else ''}", param=self._param)

    def _rule(self, body: str) -> str:
        self._count += 1
        if self._count > MAX_RULES:
            raise self._error("the schema is too large")
        self._length += len(body)
        if self._length > MAX_GRAMMAR:
            raise self._error("the schema is too large")
        name = f"r{self._count}"
        self._rules[name] = body
        return name

    def _primitive(self, name: str) -> str:
        if name not in self._rules:
            self._rules[name] = _PRIMITIVES[name]
            for each in _NEEDS.get(name, ()):
                self._primitive(each)
        return name

    def visit(self, schema: Any, path: tuple[str, ...]) -> str:
        """The name of a rule, or an expression in brackets, for one schema."""
        if schema is True:
            return self._primitive("value")
        if schema is False:
            raise self._error("a schema that allows nothing cannot be answered", path)
        if not isinstance(schema, Mapping):
            raise self._error("a schema must be an object", path)
        if len(path) > MAX_DEPTH:
            raise self._error(f"the schema is nested deeper than {MAX_DEPTH}", path[:4])
        self._check_keywords(schema, path)
        if "$ref" in schema:
            return self._reference(schema, path)
        if "const" in schema:
            return self._rule(self._literal(schema["const"], path))
        if "enum" in schema:
            return self._enum(schema["enum"], path)
        if "allOf" in schema:
            return self.visit(self._merged(schema, path), (*path, "allOf"))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._alternatives(schema, keyword, path)
        return self._typed(schema, path)

    def _check_keywords(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key in schema:
            if key not in _KEYWORDS and key not in _SILENT:
                raise self._error(f"the schema keyword {str(key)[:40]!r} cannot be enforced", path)

    def _reference(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        target = schema["$ref"]
        if not isinstance(target, str) or not target.startswith("#"):
            raise self._error("a $ref must point into the schema itself, as in #/$defs/name", path)
        if target in self._references:
            return self._references[target]
        found: Any = self._root
        for part in target.lstrip("#").strip("/").split("/") if target not in ("#", "#/") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or part not in found:
                raise self._error(f"the $ref {target[:80]!r} points nowhere", path)
            found = found[part]
        # The name is known before the body is, so that a schema may contain itself.
        name = self._rule("")
        self._references[target] = name
        body = self.visit(found, (*path, "$ref"))
        if body == name:
            raise self._error(f"the $ref {target[:80]!r} means itself", path)
        self._rules[name] = body
        return name

    def _enum(self, values: Any, path: tuple[str, ...]) -> str:
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise self._error("enum must be a list that is not empty", path)
        if len(values) > MAX_ENUM:
            raise self._error(f"enum has {len(values)} values, more than {MAX_ENUM}; the schema is too large", path)
        return self._words(sorted({_json(each) for each in values if self._literal(each, path)}))

    def _words(self, words: list[str], depth: int = 0) -> str:
        """A rule for sorted texts that branches where they differ, so that there is only one way to go on."""
        if depth > MAX_DEPTH:
            return self._rule(" | ".join(map(_quoted, words)))
        same = next((n for n, (a, b) in enumerate(zip(words[0], words[-1], strict=False)) if a != b), len(words[0]))
        head = words[0][:same]
        if len(words) == 1:
            return self._rule(_quoted(head))
        ways: list[str] = []
        start = len(head)
        for _, group in groupby(words, key=lambda each: each[start : start + 1]):
            rest = [each[start:] for each in group]
            ways.append(_quoted(rest[0]) if len(rest) == 1 else self._words(rest, depth + 1))
        return self._rule(f"{_quoted(head)} ({' | '.join(ways)})" if head else " | ".join(ways))

    def _literal(self, value: Any, path: tuple[str, ...] = ()) -> str:
        """A JSON value as a GBNF literal; objects and lists as `json.dumps` writes them."""
        try:
            return _quoted(_json(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise self._error("a constant cannot be written as JSON", path) from error

    def _merged(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        """allOf of objects becomes one object; anything else cannot be said in a grammar."""
        parts = schema["allOf"]
        if not isinstance(parts, Sequence) or not parts or not all(isinstance(each, Mapping) for each in parts):
            raise self._error("allOf must be a list of schemas", path)
        out = {key: value for key, value in schema.items() if key != "allOf"}
        if len(parts) == 1 and not any(key in _KEYWORDS for key in out):
            return dict(parts[0])
        for part in parts:
            self._check_keywords(part, path)
            if any(key in part for key in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")):
                raise self._error("allOf can only join plain object schemas", path)
            if part.get("type", "object") != "object" or out.get("type", "object") != "object":
                raise self._error("allOf can only join plain object schemas", path)
            for each in (part, out):
                if not isinstance(each.get("properties", {}), Mapping) or not isinstance(
                    each.get("required", ()), list | tuple
                ):
                    raise self._error("properties must be an object and required a list", path)
            out["type"] = "object"
            out["properties"] = {**out.get("properties", {}), **part.get("properties", {})}
            out["required"] = [*out.get("required", ()), *part.get("required", ())]
            if "additionalProperties" in part:
                out["additionalProperties"] = part["additionalProperties"]
        return out

    def _alternatives(self, schema: Mapping[str, Any], keyword: str, path: tuple[str, ...]) -> str:
        parts = schema[keyword]
        if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
            raise self._error(f"{keyword} must be a list that is not empty", path)
        if len(parts) > MAX_ALTERNATIVES:
            raise self._error(f"{keyword} has more than {MAX_ALTERNATIVES} alternatives", path)
        others = [key for key in schema if key in _KEYWORDS and key not in (keyword, "type")]
        if others:
            raise self._error(f"{keyword} beside {others[0]!r} cannot be enforced", path)
        return self._rule(" | ".join(self.visit(each, (*path, keyword)) for each in parts))

    def _typed(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        kinds = schema.get("type", _guess_type(schema))
        if isinstance(kinds, str):
            kinds = [kinds]
        if not isinstance(kinds, Sequence) or not kinds or not all(each in (*_BY_TYPE, "any") for each in kinds):
            raise self._error(f"the type {str(kinds)[:40]!r} is unknown", path)
        kinds = list(dict.fromkeys(kinds))
        if schema.get("nullable") is True and "null" not in kinds:
            kinds = [*kinds, "null"]
        if "any" in kinds:
            return self._primitive("value")
        allowed = frozenset().union(*(_BY_TYPE[each] for each in kinds)) | {"type"}
        for key in schema:
            if key in _KEYWORDS and key not in allowed:
                if any(key in known for known in _BY_TYPE.values()) and "number" not in kinds:
                    continue  # A keyword for another type says nothing about this one.
                raise self._error(f"the schema keyword {key!r} cannot be enforced for {'/'.join(kinds)}", path)
        names = [self._of_type(kind, schema, path) for kind in kinds]
        return names[0] if len(names) == 1 else self._rule(" | ".join(names))

    def _of_type(self, kind: str, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        if kind == "object":
            return self._object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            self._primitive("char")
            bounds = self._repeat(schema, "minLength", "maxLength", path)
            if bounds not in self._strings:
                self._strings[bounds] = self._rule(rf'"\"" char{bounds} "\""')
            return self._strings[bounds]
        if kind == "integer" and _BY_TYPE["integer"] & schema.keys():
            return self._integer(schema, path)
        return self._primitive(kind)

    def _repeat(self, schema: Mapping[str, Any], low: str, high: str, path: tuple[str, ...]) -> str:
        minimum, maximum = _or_zero(schema.get(low)), schema.get(high)
        for key, value in ((low, minimum), (high, maximum)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
                raise self._error(f"{key} must be a whole number up to {MAX_REPEAT}", path)
        if maximum is not None and maximum < minimum:
            raise self._error(f"{high} is less than {low}", path)
        return f"{{{minimum},{'' if maximum is None else maximum}}}"

    def _integer(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        bounds: list[int | None] = []
        for plain, exclusive, step in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
            values: list[int] = []
            for key, shift in ((plain, 0), (exclusive, step)):
                value = schema.get(key)
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
                    raise self._error(f"{key} must be a whole number here", path)
                values.append(int(value) + shift)
            bounds.append((max(values) if step == 1 else min(values)) if values else None)
        low, high = bounds
        if (low is not None and abs(low) >= 10**15) or (high is not None and abs(high) >= 10**15):
            raise self._error("integer bounds may have 15 digits at most", path)
        if low is not None and high is not None and low > high:
            raise self._error("the integer bounds leave no number", path)
        return self._rule(" | ".join(integer_range(low, high)))

    def _array(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        self._primitive("ws")
        if "prefixItems" in schema:
            parts = schema["prefixItems"]
            if not isinstance(parts, list | tuple) or not parts or schema.get("items") not in (None, False):
                raise self._error("prefixItems must be a list, and no items may follow it", path)
            if len(parts) > MAX_REPEAT:
                raise self._error(f"prefixItems has more than {MAX_REPEAT} entries", path)
            names = [self.visit(each, (*path, "prefixItems")) for each in parts]
            return self._rule('"[" ws ' + ' "," ws '.join(names) + ' ws "]"')
        item = self.visit(schema.get("items", True), (*path, "items"))
        minimum, maximum = _or_zero(schema.get("minItems")), schema.get("maxItems")
        repeat = self._repeat(schema, "minItems", "maxItems", path)
        if maximum == 0:
            return self._rule('"[" ws "]"')
        if maximum is not None or minimum > 1:
            least = max(minimum - 1, 0)
            repeat = f"{{{least},{'' if maximum is None else maximum - 1}}}"
        else:
            repeat = "*"
        body = f'{item} ("," ws {item}){repeat}'
        return self._rule(f'"[" ws {body if minimum else f"({body})?"} ws "]"')

    def _object(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        extra = schema.get("additionalProperties", "properties" not in schema)
        if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
            raise self._error("properties must be an object and required a list", path)
        if len(properties) + len(required) > MAX_RULES:
            raise self._error("the schema is too large", path)
        unknown = [each for each in required if not isinstance(each, str) or each not in properties]
        if unknown:
            raise self._error(f"required names {str(unknown[0])[:40]!r}, which is no property", path)
        self._primitive("ws")
        if not properties and extra is True:
            return self._primitive("object")
        must = frozenset(required)
        pairs = [
            (f'{self._literal(str(name))} ":" ws {self.visit(each, (*path, str(name)))}', name in must)
            for name, each in properties.items()
        ]
        rest = ""
        if extra is not False and not (extra is True and properties and not self._open(schema)):
            self._primitive("string")
            rest = f'string ":" ws {self.visit(extra, (*path, "additionalProperties"))}'
        return self._rule(f'"{{" ws {self._members(pairs, rest)} ws "}}"')

    @staticmethod
    def _open(schema: Mapping[str, Any]) -> bool:
        # Without being asked for more, a model gains nothing from properties that nobody declared,
        # and free names would let it evade the declared ones.
        return schema.get("additionalProperties") not in (None, True)

    def _members(self, pairs: list[tuple[str, bool]], rest: str) -> str:
        """Members in their declared order. Two rules for each, so the grammar stays linear in size: `these` begins
        with one of the members from here on, `more` with the comma before them, which is there only once."""
        more = self._rule(f'("," ws {rest})*') if rest else '""'
        these = self._rule(f"{rest} {more}") if rest else ""
        must = False
        for pair, is_required in reversed(pairs):
            later = f" | {these}" if these and not is_required else ""
            these = self._rule(f"{pair} {more}{later}")
            must = must or is_required
            more = self._rule(f'"," ws {these}' if must else f'("," ws {these})?')
        return these if must else f"({these})?" if these else '""'


def _guess_type(schema: Mapping[str, Any]) -> str | list[str]:
    for kind in ("object", "array", "string"):
        if _BY_TYPE[kind] & schema.keys():
            return kind
    return "integer" if _BY_TYPE["integer"] & schema.keys() else "any"


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _quoted(text: str) -> str:
    """A text as a GBNF literal; ValueError for surrogates, which no tokenizer has."""
    escaped = text.encode().decode().replace("\\", "\\\\").replace('"', '\\"')
    escaped = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found.group()):02X}", escaped)
    return f'"{escaped}"'
