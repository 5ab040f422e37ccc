"""Stand-ins for bridges whose tokenizers are built in memory."""

from __future__ import annotations

from typing import Any

import pytest

from interp import tinyworld
from tests.prompts.builders import english_words, stub, train_bpe, word_level


@pytest.fixture(scope="session")
def world() -> Any:
    return stub(tinyworld.tokenizer(), n_ctx=128)


@pytest.fixture(scope="session")
def english() -> Any:
    return stub(train_bpe(english_words()))


@pytest.fixture(scope="session")
def letters() -> Any:
    """A byte-level BPE that knows hardly any whole words."""
    return stub(train_bpe([], vocabulary=300))


@pytest.fixture(scope="session")
def words() -> Any:
    return stub(word_level(), n_ctx=16)
