r"""Regular expressions to GBNF, by way of a deterministic automaton: one rule for each state.

So the native library never has more than one way to go on, however the expression is nested: `(a*)*b` and
`(x{0,99}){0,99}`, which ruin a backtracking matcher and would ruin the library's own stacks, cost what their automaton
has states. Expressions whose automaton is large are refused before anything is generated.

The whole answer must match. Understood are literals, `.` (all but a line break), classes `[a-z]`, `[^,]`, the escapes
`\d \w \s` and their opposites (ASCII), `\n \t \r \f \v \xHH \uHHHH`, groups, `|`, `? * + {m} {m,} {m,n}` (a `?` behind
them changes nothing, since nothing is searched), and `^` and `$` at the ends. Everything else is refused by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ai_assistant.errors import InvalidArgument

MAX_REPEAT = 1000
MAX_DEPTH = 64
MAX_POSITIONS = 10_000
"""Characters of the expression after all repetitions are written out."""
MAX_STATES = 2000
MAX_EDGES = 30_000
_MAX_WORK = 4_000_000

Ranges = tuple[tuple[int, int], ...]
"""Code points, sorted, without overlaps."""

# Zero ends a text in the native library, and surrogates are no characters.
_ALL: Ranges = ((1, 0xD7FF), (0xE000, 0x10FFFF))
_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))
_CONTROL = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11}


@dataclass(frozen=True, slots=True)
class _Chars:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class _Chain:
    parts: tuple[_Tree, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    parts: tuple[_Tree, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    inner: _Tree
    low: int
    high: int | None


_Tree = _Chars | _Chain | _Choice | _Repeat


def grammar_of_regex(pattern: str, *, param: str = "response_regex") -> str:
    """GBNF with the start symbol `root` for exactly the texts that match `pattern` from end to end.

    Raises:
        InvalidArgument: it is no regular expression, uses what cannot be enforced, or is too complex.
    """
    tree = _Reader(pattern, param).read()
    return _Automaton(tree, param).text()


class _Reader:
    def __init__(self, pattern: str, param: str) -> None:
        self._text = pattern
        self._at = 0
        self._param = param

    def read(self) -> _Tree:
        tree = self._choice(0)
        if self._at < len(self._text):
            raise self._error("has a ) without a (")
        return tree

    def _error(self, message: str, hint: str = "") -> InvalidArgument:
        return InvalidArgument(f"the regular expression {message} (at {self._at})", hint=hint, param=self._param)

    def _peek(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _take(self) -> str:
        if self._at >= len(self._text):
            raise self._error("ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _choice(self, depth: int) -> _Tree:
        if depth > MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH}")
        parts = [self._chain(depth)]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._chain(depth))
        return parts[0] if len(parts) == 1 else _Choice(tuple(parts))

    def _chain(self, depth: int) -> _Tree:
        parts: list[_Tree] = []
        while (each := self._peek()) and each not in "|)":
            if each == "^":
                if parts or depth:
                    raise self._error("has a ^ that is not at its beginning", "the whole answer must match anyway")
                self._at += 1
            elif each == "$":
                self._at += 1
                if depth or self._peek() not in ("", "|"):
                    raise self._error("has a $ that is not at its end", "the whole answer must match anyway")
            else:
                parts.append(self._repeated(self._atom(depth)))
        return parts[0] if len(parts) == 1 else _Chain(tuple(parts))

    def _repeated(self, inner: _Tree) -> _Tree:
        bounds = self._bounds()
        if bounds is None:
            return inner
        if self._peek() == "?":
            self._at += 1
        elif self._peek() in ("*", "+", "{") and self._peek():
            raise self._error("repeats a repetition", "put it into brackets")
        return _Repeat(inner, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        each = self._peek()
        simple = {"?": (0, 1), "*": (0, None), "+": (1, None)}
        if each in simple:
            self._at += 1
            return simple[each]
        if each != "{":
            return None
        end = self._text.find("}", self._at)
        low, comma, high = self._text[self._at + 1 : max(end, 0)].partition(",")
        if (
            end < 0
            or not all((part.isascii() and part.isdecimal()) or not part for part in (low, high))
            or not (low or high)
        ):
            raise self._error("has a { that is no repetition", r"write \{ for the character")
        if len(low) > 9 or len(high) > 9 or int(low or 0) > MAX_REPEAT or int(high or 0) > MAX_REPEAT:
            raise self._error(f"repeats more than {MAX_REPEAT} times", "use * or + where the number does not matter")
        least = int(low or 0)
        most = int(high) if high else None if comma else least
        if most is not None and most < least:
            raise self._error("has a repetition whose bounds are the wrong way round")
        self._at = end + 1
        return least, most

    def _atom(self, depth: int) -> _Tree:
        each = self._take()
        if each == "(":
            self._group()
            inner = self._choice(depth + 1)
            if self._peek() != ")":
                raise self._error("has a ( without a )")
            self._at += 1
            return inner
        if each == "[":
            return _Chars(self._class())
        if each == "\\":
            return _Chars(self._escape())
        if each == ".":
            return _Chars(_without(_ALL, ((10, 10),)))
        if each in "*+?{":
            self._at -= 1
            raise self._error("has nothing to repeat", rf"write \{each} for the character")
        return _Chars(self._one(ord(each)))

    def _group(self) -> None:
        if self._peek() != "?":
            return
        for begin in ("?:", "?P<", "?<"):
            if self._peek(len(begin)) == begin and self._peek(3) not in ("?<=", "?<!"):
                self._at += len(begin)
                if begin != "?:":
                    end = self._text.find(">", self._at)
                    if end < 0 or not self._text[self._at : end].isidentifier():
                        raise self._error("has a group with a wrong name")
                    self._at = end + 1
                return
        if self._peek(2) in ("?=", "?!", "?<"):
            raise self._error("looks ahead or behind, which cannot be enforced")
        if self._peek(3) == "?P=":
            raise self._error("refers back to a group, which cannot be enforced")
        raise self._error("has a group of an unknown kind", "use (…) or (?:…), without flags")

    def _one(self, code: int) -> Ranges:
        if code == 0 or 0xD800 <= code <= 0xDFFF:
            raise self._error("names what is no character of a text")
        return ((code, code),)

    def _escape(self) -> Ranges:
        each = self._take()
        classes = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
        if each.lower() in classes:
            found = classes[each.lower()]
            return found if each.islower() else _without(_ALL, found)
        if each in _CONTROL:
            return self._one(_CONTROL[each])
        if each in "xu":
            digits = self._peek(2 if each == "x" else 4)
            self._at += len(digits)
            if len(digits) != (2 if each == "x" else 4) or not all(one in "0123456789abcdefABCDEF" for one in digits):
                raise self._error(rf"has a \{each} without its digits")
            return self._one(int(digits, 16))
        if each.isdecimal():
            raise self._error("refers back to a group, which cannot be enforced")
        if each in "bBAZzG":
            raise self._error(rf"uses \{each}, which cannot be enforced", "the whole answer must match anyway")
        if each.isalpha():
            raise self._error(rf"uses \{each}, which is not known")
        return self._one(ord(each))

    def _class(self) -> Ranges:
        negated = self._peek() == "^"
        self._at += negated
        found: list[tuple[int, int]] = []
        first = True
        while (each := self._take()) != "]" or first:
            first = False
            low = self._escape() if each == "\\" else self._one(ord(each))
            if self._peek() == "-" and self._peek(2) != "-]":
                self._at += 1
                each = self._take()
                high = self._escape() if each == "\\" else self._one(ord(each))
                if _size(low) != 1 or _size(high) != 1 or low[0][0] > high[0][0]:
                    raise self._error("has a range that does not go from a character to a later one")
                low = ((low[0][0], high[0][0]),)
            found += low
        ranges = _without(_ALL, _without(_ALL, _sorted(found)))
        ranges = _without(_ALL, ranges) if negated else ranges
        if not ranges:
            raise self._error("has a class without characters")
        return ranges


class _Automaton:
    """States of the expression: first with several ways to go on, then with one."""

    def __init__(self, tree: _Tree, param: str) -> None:
        self._param = param
        self._free: list[list[int]] = []
        """For each state those that need no character."""
        self._edges: list[tuple[Ranges, int] | None] = []
        self._positions = 0
        start, self._end = self._new(), self._new()
        self._build(tree, start, self._end)
        self._reach: dict[int, frozenset[int]] = {}
        self._work = 0
        self._rows: list[dict[int, list[tuple[int, int]]]] = []
        self._final: list[bool] = []
        self._determine(start)

    def _error(self) -> InvalidArgument:
        return InvalidArgument(
            "the regular expression is too complex",
            hint="repeat less, and put what may stand anywhere behind what is fixed",
            param=self._param,
        )

    def _new(self) -> int:
        self._free.append([])
        self._edges.append(None)
        if len(self._free) > 8 * MAX_POSITIONS:
            raise self._error()
        return len(self._free) - 1

    def _build(self, tree: _Tree, begin: int, end: int) -> None:
        if isinstance(tree, _Chars):
            self._positions += 1
            if self._positions > MAX_POSITIONS:
                raise self._error()
            middle = self._new()
            self._free[begin].append(middle)
            self._edges[middle] = (tree.ranges, end)
        elif isinstance(tree, _Chain):
            for part in tree.parts[:-1]:
                after = self._new()
                self._build(part, begin, after)
                begin = after
            if tree.parts:
                self._build(tree.parts[-1], begin, end)
            else:
                self._free[begin].append(end)
        elif isinstance(tree, _Choice):
            for part in tree.parts:
                self._build(part, begin, end)
        else:
            self._build_repeat(tree, begin, end)

    def _build_repeat(self, tree: _Repeat, begin: int, end: int) -> None:
        for _ in range(tree.low):
            after = self._new()
            self._build(tree.inner, begin, after)
            begin = after
        if tree.high is None:
            # A state of its own, so that nothing that leads to `begin` can be gone through again.
            loop, back = self._new(), self._new()
            self._free[begin].append(loop)
            self._build(tree.inner, loop, back)
            self._free[back].append(loop)
            self._free[loop].append(end)
            return
        for _ in range(tree.high - tree.low):
            self._free[begin].append(end)
            after = self._new()
            self._build(tree.inner, begin, after)
            begin = after
        self._free[begin].append(end)

    def _closure(self, states: Iterable[int]) -> frozenset[int]:
        """Those of the reachable states that read a character, and the end."""
        seen: set[int] = set()
        todo = list(states)
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += self._free[state]
        self._work += len(seen) + 1
        if self._work > _MAX_WORK:
            raise self._error()
        return frozenset(each for each in seen if self._edges[each] is not None or each == self._end)

    def _determine(self, start: int) -> None:
        numbers: dict[frozenset[int], int] = {}
        todo: deque[frozenset[int]] = deque()

        def number(states: frozenset[int]) -> int:
            if states not in numbers:
                if len(numbers) >= MAX_STATES:
                    raise self._error()
                numbers[states] = len(numbers)
                todo.append(states)
            return numbers[states]

        number(self._closure([start]))
        edges = 0
        while todo:
            states = todo.popleft()
            row: dict[int, list[tuple[int, int]]] = {}
            for low, high, targets in self._split(states):
                row.setdefault(number(self._closure(targets)), []).append((low, high))
                edges += 1
                if edges > MAX_EDGES:
                    raise self._error()
            self._rows.append(row)
            self._final.append(self._end in states)
        if not self._rows[0]:
            raise InvalidArgument("the regular expression allows only an empty answer", param=self._param)

    def _split(self, states: frozenset[int]) -> list[tuple[int, int, frozenset[int]]]:
        """Ranges of characters, each with the states that every character of it leads to."""
        changes: dict[int, list[tuple[bool, int]]] = {}
        for state in states:
            edge = self._edges[state]
            if edge is None:
                continue
            self._work += len(edge[0])
            for low, high in edge[0]:
                changes.setdefault(low, []).append((True, edge[1]))
                changes.setdefault(high + 1, []).append((False, edge[1]))
        out: list[tuple[int, int, frozenset[int]]] = []
        # Several edges may lead to one state, so they are counted.
        active: dict[int, int] = {}
        before = 0
        for code in sorted(changes):
            if active:
                out.append((before, code - 1, frozenset(active)))
                self._work += len(active)
            for begins, target in changes[code]:
                active[target] = active.get(target, 0) + (1 if begins else -1)
                if not active[target]:
                    del active[target]
            before = code
            if self._work > _MAX_WORK:
                raise self._error()
        return out

    def text(self) -> str:
        lines = ["root ::= s0"]
        for index, row in enumerate(self._rows):
            if not row:
                continue
            # A state that only ends needs no rule: nothing follows the character that leads to it.
            ways = [f"{_set(ranges)}{f' s{to}' if self._rows[to] else ''}" for to, ranges in row.items()]
            lines.append(f"s{index} ::= " + " | ".join([*ways, *(['""'] if self._final[index] else [])]))
        return "\n".join(lines)


def _sorted(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in ranges:
        for first, last in others:
            if last < low or first > high:
                continue
            if first > low:
                out.append((low, first - 1))
            low = last + 1
        if low <= high:
            out.append((low, high))
    return tuple(out)


def _size(ranges: Ranges) -> int:
    return sum(high - low + 1 for low, high in ranges)


def _set(ranges: Iterable[tuple[int, int]]) -> str:
    parts = [_code(low) + (f"-{_code(high)}" if high > low else "") for low, high in _sorted(ranges)]
    return f"[{''.join(parts)}]"


def _code(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 256 else f"\\u{code:04X}" if code < 65536 else f"\\U{code:08X}"
