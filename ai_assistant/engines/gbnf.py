"""Walks a GBNF grammar along a text, to know what following it will cost before the native library pays.

The library keeps every way in which a text can have come about as a stack of its own, compares each new one with
all others, and never stops: a schema of a few hundred bytes can double their number with every bracket. Its check
for left recursion walks every path once per path. So both are counted here first, with limits, in the same terms.

States are sets of stacks, and a transition is computed once: text that goes round in circles, as JSON does, costs a
dictionary look-up per character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from ai_assistant.errors import InvalidArgument

MAX_STACKS = 192
"""Ways in which a text may have come about. Following one token costs about the square of it."""
MAX_EXPANDED = 60_000
"""Rules after the library has written out the repetitions; each takes some 200 bytes."""
MAX_WALK = 20_000_000
"""Steps of the library's check for left recursion, some nanoseconds each."""
MAX_NESTING = 64
"""Brackets within brackets, which the library follows by recursion."""
_MAX_CLOSURE = 20_000
_MAX_NODES = 200_000
_OPENING = 16
"""Brackets that one token of a vocabulary may have in a row."""

_TOKEN = re.compile(
    r"""\s*(?: "(?P<literal>(?:\\.|[^"\\])*)" | \[(?P<set>(?:\\.|[^\]\\])*)\] | (?P<any>\.)
    | \{(?P<low>\d+)(?P<comma>,)?(?P<high>\d*)\} | (?P<mark>[*+?()|]) | (?P<name>[A-Za-z][A-Za-z0-9-]*) )""",
    re.X | re.S,
)
_CHARACTER = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.S)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True, slots=True, eq=False)
class _Set:
    """One character out of ranges, or any that is in none of them."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def has(self, code: int) -> bool:
        return any(low <= code <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class _Repeat:
    inner: list[_Sequence]
    low: int
    high: int | None


@dataclass(slots=True, eq=False)
class _Sequence:
    items: list[_Set | _Rule | _Repeat] = field(default_factory=list)


class TooComplex(InvalidArgument):
    """A grammar that cannot be followed within the limits."""

    @property
    def name(self) -> str:
        return "InvalidArgument"


def _refused(why: str, hint: str = "") -> TooComplex:
    return TooComplex(
        f"what is asked for cannot be enforced: {why}",
        hint=hint or "use fewer alternatives and optional properties, and such as differ at their beginning",
    )


class Grammar:
    """A parsed grammar, found to be harmless to load. Never changes, so it may be used from any thread.

    Raises:
        InvalidArgument: it would take the library too much memory or time, or means itself.
        ValueError: it is no GBNF of the kind that this package writes.
    """

    def __init__(self, text: str) -> None:
        self._rules: dict[str, list[_Sequence]] = {}
        self._expanded = 0
        for line in text.splitlines():
            name, _, body = line.partition(" ::= ")
            parsed, at = self._alternatives(body, 0, 0)
            if body[at:].strip():
                raise ValueError(f"no GBNF: {body[at : at + 40]!r}")
            self._rules[name] = parsed
            self._expanded += 1
        if self._expanded > MAX_EXPANDED:
            raise _refused("it is too large", "lower maxLength and maxItems, or drop properties")
        self._check_walk()

    @property
    def rules(self) -> dict[str, list[_Sequence]]:
        return self._rules

    def _alternatives(self, text: str, at: int, depth: int) -> tuple[list[_Sequence], int]:
        if depth > MAX_NESTING:
            raise _refused("it is nested too deeply", "use fewer levels")
        out = [_Sequence()]
        while found := _TOKEN.match(text, at):
            items = out[-1].items
            mark = found["mark"]
            if mark == ")":
                break
            at = found.end()
            if mark == "|":
                out.append(_Sequence())
            elif mark == "(":
                inner, at = self._alternatives(text, at, depth + 1)
                if text[at : at + 1] != ")" and text[at:].lstrip()[:1] != ")":
                    raise ValueError("no GBNF: a bracket is not closed")
                at = text.index(")", at) + 1
                items.append(_Repeat(inner, 1, 1))
                self._expanded += 1
            elif mark or found["low"]:
                self._repeat(items, found)
            elif found["name"]:
                items.append(_Rule(found["name"]))
            elif found["any"]:
                items.append(_Set((), True))
            elif found["set"] is not None:
                items.append(_set_of(found["set"]))
            else:
                codes = [ord(each) for each, _ in _characters(found["literal"])]
                if len(codes) != 1:
                    # A literal is one thing to repeat; "" is nothing at all.
                    whole = _Sequence([_Set(((code, code),)) for code in codes])
                    items.append(_Repeat([whole], 1, 1))
                else:
                    items.append(_Set(((codes[0], codes[0]),)))
        return out, at

    def _repeat(self, items: list[_Set | _Rule | _Repeat], found: re.Match[str]) -> None:
        if not items:
            raise ValueError("no GBNF: nothing to repeat")
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found["mark"] or "", (0, None))
        if found["low"]:
            low = int(found["low"])
            high = int(found["high"]) if found["high"] else None if found["comma"] else low
        self._expanded += max(low, high or 1)
        items[-1] = _Repeat([_Sequence([items[-1]])], low, high)

    def _check_walk(self) -> None:
        """Count what the library's check for left recursion will do."""
        empty = self._nullable()
        costs: dict[str, int] = {}
        total = 0
        for name in self._in_order(empty):
            costs[name] = min(1 + sum(self._cost(each, empty, costs) for each in self._rules[name]), MAX_WALK + 1)
            total += costs[name]
        for sequences in self._rules.values():
            # Every written-out repetition is a rule that is walked once more.
            todo = [each for sequence in sequences for each in sequence.items]
            while todo:
                item = todo.pop()
                if isinstance(item, _Repeat):
                    if (item.low, item.high) != (1, 1):
                        inner = sum(self._cost(each, empty, costs) for each in item.inner)
                        total += max(item.low, item.high or 1) * inner
                    todo += [each for sequence in item.inner for each in sequence.items]
        if total > MAX_WALK:
            raise _refused("its alternatives branch into too many others")

    def _cost(self, sequence: _Sequence, empty: set[str], costs: dict[str, int]) -> int:
        total = 1
        for item in sequence.items:
            if isinstance(item, _Set):
                break
            if isinstance(item, _Rule):
                total += costs[item.name]
                if item.name not in empty:
                    break
            else:
                inner = sum(self._cost(each, empty, costs) for each in item.inner)
                hollow = any(self._is_empty(each, empty) for each in item.inner)
                total += inner * (max(item.low, item.high or 1) if hollow else 1)
                if item.low and not hollow:
                    break
        return min(total, MAX_WALK + 1)

    def _in_order(self, empty: set[str]) -> list[str]:
        """All rules, each behind those that it may begin with."""
        out: list[str] = []
        done: dict[str, bool] = {}
        for start in self._rules:
            todo = [(start, False)]
            while todo:
                name, finished = todo.pop()
                if finished:
                    done[name] = True
                    out.append(name)
                elif name not in done:
                    if name not in self._rules:
                        raise ValueError(f"no GBNF: there is no rule {name!r}")
                    done[name] = False
                    todo.append((name, True))
                    todo += [(each, False) for one in self._rules[name] for each in self._firsts(one, empty)]
                elif not done[name]:
                    raise _refused("a part of it means itself", "let a reference stand inside an object or a list")
        return out

    def _firsts(self, sequence: _Sequence, empty: set[str]) -> list[str]:
        """The rules that a sequence may begin with."""
        out: list[str] = []
        for item in sequence.items:
            if isinstance(item, _Set):
                break
            if isinstance(item, _Rule):
                out.append(item.name)
                if item.name not in empty:
                    break
            else:
                out += [each for one in item.inner for each in self._firsts(one, empty)]
                if item.low and not any(self._is_empty(each, empty) for each in item.inner):
                    break
        return out

    def _nullable(self) -> set[str]:
        empty: set[str] = set()
        before = -1
        while len(empty) > before:
            before = len(empty)
            for name, sequences in self._rules.items():
                if name not in empty and any(self._is_empty(each, empty) for each in sequences):
                    empty.add(name)
        return empty

    def _is_empty(self, sequence: _Sequence, empty: set[str]) -> bool:
        for item in sequence.items:
            if isinstance(item, _Set):
                return False
            if isinstance(item, _Rule):
                if item.name not in empty:
                    return False
            elif item.low and not any(self._is_empty(each, empty) for each in item.inner):
                return False
        return True


class Walk:
    """Where a text stands in a grammar, for one generation. Not for several threads at once.

    Raises:
        InvalidArgument: there are too many ways already in which a text may begin.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._rules = grammar.rules
        self._nodes: list[tuple[_Sequence, int, int, int]] = [(_Sequence(), 0, 0, 0)]
        self._numbers: dict[tuple[int, int, int, int], int] = {}
        self._states: dict[frozenset[int], int] = {}
        self._positions: list[frozenset[int]] = []
        self._steps: dict[tuple[int, str], int] = {}
        self._safe: set[int] = set()
        self.state = self._state(self._closure([self._node(each, 0, 0, 0) for each in self._rules["root"]]))
        self.feed("")

    def _node(self, sequence: _Sequence, index: int, count: int, parent: int) -> int:
        """A stack's number: a place in a sequence, the turns of its repetition, and the stack below. 0 is empty."""
        if index == len(sequence.items):
            return parent
        key = (id(sequence), index, count, parent)
        found = self._numbers.get(key)
        if found is None:
            if len(self._nodes) > _MAX_NODES:
                raise _refused("there are too many ways to write it")
            found = len(self._nodes)
            self._nodes.append((sequence, index, count, parent))
            self._numbers[key] = found
        return found

    def _closure(self, todo: list[int]) -> frozenset[int]:
        """The stacks that stand before a character, or are empty, which those in `todo` can become without one."""
        seen: set[int] = set()
        out: set[int] = set()
        while todo:
            number = todo.pop()
            if number in seen:
                continue
            seen.add(number)
            if len(seen) > _MAX_CLOSURE or len(out) > MAX_STACKS:
                raise _refused(f"there are more than {MAX_STACKS} ways in which a text may go on")
            if number == 0:
                out.add(0)
                continue
            sequence, index, count, parent = self._nodes[number]
            item = sequence.items[index]
            if isinstance(item, _Set):
                out.add(number)
                continue
            after = self._node(sequence, index + 1, 0, parent)
            if isinstance(item, _Rule):
                todo += [self._node(each, 0, 0, after) for each in self._rules[item.name]]
                continue
            if count >= item.low:
                todo.append(after)
            if item.high is None or count < item.high:
                turns = count + 1 if item.high is not None else min(count + 1, item.low)
                back = after if turns == item.high else self._node(sequence, index, turns, parent)
                todo += [self._node(each, 0, 0, back) for each in item.inner]
        return frozenset(out)

    def _state(self, positions: frozenset[int]) -> int:
        found = self._states.get(positions)
        if found is None:
            found = self._states[positions] = len(self._positions)
            self._positions.append(positions)
        return found

    def _step(self, state: int, character: str) -> int:
        key = (state, character)
        found = self._steps.get(key)
        if found is None:
            code = ord(character)
            todo: list[int] = []
            for number in self._positions[state]:
                sequence, index, _, parent = self._nodes[number]
                item = sequence.items[index] if number else None
                if isinstance(item, _Set) and item.has(code):
                    todo.append(self._node(sequence, index + 1, 0, parent))
            found = self._steps[key] = self._state(self._closure(todo))
        return found

    def feed(self, text: str) -> None:
        """Go on along `text`, to where any token of a vocabulary can be tried as well.

        Raises:
            InvalidArgument: there are too many ways in which it can have come about, or will after more brackets.
        """
        for each in text:
            self.state = self._step(self.state, each)
        ahead = self.state
        if ahead in self._safe:
            return
        self._step(ahead, "{")
        for _ in range(_OPENING):
            ahead = self._step(ahead, "[")
            if not self._positions[ahead]:
                break
        self._safe.add(self.state)

    @property
    def width(self) -> int:
        """The number of stacks that the library has here; 0 if the text is not allowed."""
        return len(self._positions[self.state])

    @property
    def may_end(self) -> bool:
        return 0 in self._positions[self.state]

    @property
    def must_end(self) -> bool:
        return self._positions[self.state] == {0}


@lru_cache(maxsize=8)
def parsed(text: str) -> Grammar:
    """The grammar of a text; the same schema comes again and again."""
    return Grammar(text)


def _characters(text: str) -> list[tuple[str, bool]]:
    """Characters of a literal or set, and whether each was written with a backslash."""
    out: list[tuple[str, bool]] = []
    for found in _CHARACTER.finditer(text):
        digits = found[1] or found[2] or found[3]
        if digits:
            out.append((chr(int(digits, 16)), True))
        elif found[4]:
            out.append((_ESCAPES.get(found[4], found[4]), True))
        else:
            out.append((found[5], False))
    return out


def _set_of(text: str) -> _Set:
    characters = _characters(text)
    negated = bool(characters) and characters[0] == ("^", False)
    if negated:
        del characters[0]
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < len(characters):
        low = high = ord(characters[at][0])
        if at + 2 < len(characters) and characters[at + 1] == ("-", False):
            high = ord(characters[at + 2][0])
            at += 2
        ranges.append((low, high))
        at += 1
    return _Set(tuple(ranges), negated)
