"""A hub id to a local directory: the cache first, the network only when it answers, and errors that say what to do."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

from interp.models.directories import has_tokenizer, require_model
from interp.models.embedded import near_names

_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)$")
_UNGATED = {
    "llama": "HuggingFaceTB/SmolLM2-135M, TinyLlama/TinyLlama-1.1B-Chat-v1.0 or Qwen/Qwen2.5-0.5B",
    "gemma": "Qwen/Qwen2.5-1.5B or EleutherAI/pythia-1.4b",
    "mistral": "Qwen/Qwen2.5-7B or allenai/OLMo-2-1124-7B",
}
_PATIENCE = 0.6  # seconds for a name to resolve and a connection to open: the whole refusal stays under one second


def hub_directory(name: str, *, tokenizer: bool, code: bool = False) -> Path:
    """The local snapshot of a hub model, `"owner/name"` or `"owner/name@revision"`, downloaded if need be.

    A complete copy in the local cache is used as it is, without asking the network. Otherwise the hub must answer
    within a second, or this raises.

    Args:
        tokenizer: Whether the snapshot must hold a tokenizer.
        code: Whether to fetch the Python files of models that bring their own code.

    Raises:
        ValueError: If the name cannot be a hub id; with embedded names that resemble it.
        FileNotFoundError: If the model is not in the cache and the hub cannot be reached, or has no such model or
        revision. PermissionError: If the model is gated: which one, where to accept its terms, how to sign in, what to
        use instead.
    """
    repo, _, revision = name.partition("@")
    if not _ID.match(repo):
        raise ValueError(f"{name!r} is neither an embedded model, a directory nor a hub id (owner/name){_hint(repo)}")
    cached = _cached(repo, revision or None, tokenizer)
    if cached is not None:
        return cached
    if _told_offline() or not _reachable():
        why = "HF_HUB_OFFLINE is set" if _told_offline() else "the hub does not answer"
        raise FileNotFoundError(
            f"{name!r} is not in the local cache and {why}{_hint(repo)}. Use an embedded model "
            f"(interp.list_models()), pass a directory made by save_pretrained, or "
            f"download it where there is a network: `hf download {repo}`"
        )
    return _download(repo, revision or None, tokenizer, code)


def _cached(repo: str, revision: str | None, tokenizer: bool) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    try:
        require_model(snapshot, tokenizer=tokenizer)
    except (FileNotFoundError, ValueError):
        return None
    return snapshot


def _download(repo: str, revision: str | None, tokenizer: bool, code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = [entry.rfilename for entry in HfApi().model_info(repo, revision=revision, timeout=10).siblings or []]
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=_needed(files, code))
    except GatedRepoError as error:
        family = next((key for key in _UNGATED if key in repo.lower()), "llama")
        raise PermissionError(
            f"{repo} is gated. Accept its terms at https://huggingface.co/{repo}, make a token at "
            f"https://huggingface.co/settings/tokens and set HF_TOKEN to it; or use an ungated model such as "
            f"{_UNGATED[family]}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}; see https://huggingface.co/{repo}/tree/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no model {repo!r}, or it is private{_hint(repo)}. Check the spelling; "
            f"for a private model set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"could not download {repo}: {type(error).__name__}: {error}") from error
    directory = Path(snapshot)
    require_model(directory, tokenizer=False)
    if tokenizer and not has_tokenizer(directory):
        raise FileNotFoundError(f"{repo} has no tokenizer files; pass tokenizer= (a directory, or a tokenizer object)")
    return directory


def _needed(files: list[str], code: bool) -> list[str]:
    """Config, tokenizer and one set of weights; not the other formats that many repositories keep beside them."""
    weights = [name for name in files if _WEIGHTS.match(name)]
    best = [name for name in weights if name.endswith(".safetensors")] or weights
    small = [name for name in files if "/" not in name and name.endswith((".json", ".model", ".txt", ".jinja"))]
    return best + small + ([name for name in files if name.endswith(".py")] if code else [])


def _told_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _reachable() -> bool:
    """Whether a connection to the hub (or to the proxy on the way) opens in time. In a thread: a name look-up has no
    time limit."""
    from huggingface_hub import constants

    proxy = next(
        (os.environ[name] for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)), None
    )
    address = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}" if proxy else constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return opened.is_set()


def _hint(name: str) -> str:
    near = near_names(name)
    return f"; did you mean the embedded model {' or '.join(map(repr, near))}?" if near else ""
