"""Punctuation: marks that carry structure, and marks that carry nothing and fall anywhere."""

from __future__ import annotations

PUNCTUATION = (".", ",", ":", ";", "?", "(", ")", '"""')
EMPTY_MARKS = ("~", "*", "#", "^", "|")
