"""Which of many rows of tokens shares the longest beginning with a prompt: a radix tree."""

from __future__ import annotations

import numpy as np

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.task import common


class _Node:
    __slots__ = ("children", "key", "label", "parent")

    def __init__(self, label: Tokens, parent: _Node | None, key: int | None = None) -> None:
        self.label = label
        """The tokens between the parent and here."""
        self.parent = parent
        self.children: dict[int, _Node] = {}
        """By their label's first token."""
        self.key = key
        """Whose row ends here."""


class PrefixIndex:
    """Rows of tokens by number. A search costs its own length, however many rows there are."""

    def __init__(self) -> None:
        self._root = _Node(np.zeros(0, dtype=np.int32), None)
        self._ends: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def insert(self, key: int, row: Tokens) -> int | None:
        """Add a row. Returns the number of the row that was the same, if one was; it is replaced."""
        node, at = self._root, 0
        while at < len(row):
            child = node.children.get(int(row[at]))
            if child is None:
                child = node.children[int(row[at])] = _Node(row[at:].copy(), node)
                node, at = child, len(row)
                break
            shared = common(child.label, row[at:])
            if shared < len(child.label):
                child = self._split(child, shared)
            node, at = child, at + shared
        former, node.key = node.key, key
        if former is not None:
            del self._ends[former]
        self._ends[key] = node
        return former

    @staticmethod
    def _split(node: _Node, at: int) -> _Node:
        parent = node.parent
        assert parent is not None
        upper = _Node(node.label[:at].copy(), parent)
        parent.children[int(upper.label[0])] = upper
        node.label, node.parent = node.label[at:].copy(), upper
        upper.children[int(node.label[0])] = node
        return upper

    def remove(self, key: int) -> None:
        """Forget a row; unknown numbers are ignored."""
        node = self._ends.pop(key, None)
        if node is None:
            return
        node.key = None
        while node.parent is not None and node.key is None and not node.children:
            del node.parent.children[int(node.label[0])]
            node = node.parent

    def longest(self, prompt: Tokens) -> tuple[int | None, int]:
        """A row that shares the longest beginning, and its length in tokens; (None, 0) if none shares any."""
        node, at = self._root, 0
        while at < len(prompt):
            child = node.children.get(int(prompt[at]))
            if child is None:
                break
            shared = common(child.label, prompt[at:])
            node, at = child, at + shared
            if shared < len(child.label):
                break
        return (self._any(node), at) if at else (None, 0)

    def whole(self, prompt: Tokens) -> tuple[int | None, int]:
        """The longest row that is itself a beginning of `prompt`, and its length."""
        node, at, best, length = self._root, 0, None, 0
        while at < len(prompt):
            child = node.children.get(int(prompt[at]))
            if child is None or common(child.label, prompt[at:]) < len(child.label):
                break
            node, at = child, at + len(child.label)
            if node.key is not None:
                best, length = node.key, at
        return best, length

    @staticmethod
    def _any(node: _Node) -> int | None:
        """The nearest row at or below a node: the shortest state that has the beginning."""
        level = [node]
        while level:
            for each in level:
                if each.key is not None:
                    return each.key
            level = [child for each in level for child in each.children.values()]
        return None

    def clear(self) -> None:
        self._root.children.clear()
        self._ends.clear()
