"""Settings of every test: offline, silent, one thread. Model builders are in `tests/helpers.py`."""

from __future__ import annotations

import os

# Set before anything imports torch or huggingface_hub: both read the environment once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["INTERP_PROGRESS"] = "0"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches runtime type checks off, so that a test reaches the message that a user without them would see."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
