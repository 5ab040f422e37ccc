"""Tables written as text, so that a new word or fact is a word or a line."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def rows(text: str) -> list[tuple[str, ...]]:
    """The words of every line that is not empty."""
    return [words(line) for line in text.splitlines() if line.strip()]


def pairs(text: str) -> dict[str, str]:
    """Words taken two by two: the first of each stands for the second."""
    items = text.split()
    return dict(zip(items[::2], items[1::2], strict=True))
