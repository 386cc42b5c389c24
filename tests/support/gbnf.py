"""Turns a GBNF grammar into a regular expression, to test grammars without the native library."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s*(?: "(?P<literal>(?:\\.|[^"\\])*)" | (?P<set>\[(?:\\.|[^\]\\])*\])
    | (?P<repeat>\{\d*,?\d*\}|[*+?]) | (?P<mark>[()|]) | (?P<name>[A-Za-z][A-Za-z0-9-]*) )""",
    re.X,
)


def compiled(grammar: str, depth: int = 8) -> re.Pattern[str]:
    """A pattern for whole texts; rules within rules are followed `depth` levels deep, then match nothing."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
    return re.compile(_expand(rules, rules["root"], {}, depth))


def _expand(rules: dict[str, str], body: str, open_rules: dict[str, int], depth: int) -> str:
    out: list[str] = []
    at = 0
    while at < len(body.rstrip()):
        found = _TOKEN.match(body, at)
        if found is None:
            raise ValueError(f"no GBNF: {body[at : at + 40]!r}")
        at = found.end()
        if (literal := found["literal"]) is not None:
            out.append(f"(?:{re.escape(_unescaped(literal))})")
        elif (name := found["name"]) is not None:
            level = open_rules.get(name, 0)
            # Recursion is cut where a regular expression cannot follow.
            limit = 2 if level else depth
            inner = _expand(rules, rules[name], {**open_rules, name: level + 1}, depth) if level < limit else "(?!)"
            out.append(f"(?:{inner})")
        else:
            out.append(found["set"] or found["repeat"] or found["mark"].replace("(", "(?:"))
    return "".join(out)


def _unescaped(text: str) -> str:
    escapes = {"n": "\n", "t": "\t", "r": "\r"}

    def one(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code[1:], 16)) if code[0] == "x" else escapes.get(code, code)

    return re.sub(r"\\(x[0-9A-Fa-f]{2}|.)", one, text)
