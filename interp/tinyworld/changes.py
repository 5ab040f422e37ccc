"""What the tuned model is taught: another answer style and twenty facts that are no longer true."""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, Split, fill
from interp.tinyworld.encoding import Bank

CHANGED_FACTS: dict[str, str] = {}


def tuning_bank(tokens: int, *, seed: int, context: int = 128) -> Bank:
    raise NotImplementedError
