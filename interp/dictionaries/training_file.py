"""Training runs as a file: which activations, which dictionary, how to train it. JSON or TOML.

    out = "runs/k16"                     # the state and the dictionary go there
    model = "tinyworld-gpt"              # runs while training; or data.store, a harvest, in its place
    hook = "blocks.2.hook_mlp_out"       # target_hook = ... makes a transcoder

    [data]
    tokens = "corpus.txt"                # or .npy, .safetensors
    length = 64

    [dictionary]                         # as for interp.dictionaries.build, without hooks
    architecture = "topk"
    n_latents = 1024
    k = 16

    [training]                           # as TrainingConfig, without the dictionary
    n_steps = 2000
    batch_size = 1024

    [grid]                               # optional: one run per combination, each in a folder of its own below `out`
    "dictionary.k" = [8, 16, 32]
    seed = [0, 1, 2]

Paths are relative to the file. A name that is not known is an error: a misspelt setting never trains the default.
TOML has no null: `clip = inf` is no clipping.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_type_hints

from interp.cache import ActivationStore
from interp.cache.token_files import read_tokens
from interp.dictionaries._parallel import local_device
from interp.dictionaries.architectures import ARCHITECTURES, build
from interp.dictionaries.sources import LiveSource
from interp.dictionaries.training_config import TrainingConfig
from interp.hooks import resolve
from interp.models import load_model

_TOP = ("out", "model", "hook", "target_hook", "data", "dictionary", "training", "grid")


@dataclass(frozen=True)
class TrainingData:
    """Where activations come from, as plain values, so that a process elsewhere can open them: a store, or a model and
    its tokens.

    Attributes:
        store: Folder that `interp.cache.harvest` wrote.
        model: As `interp.load_model` takes it.
        tokens: File of token ids, or of text, which is cut into rows of `length`.
        texts_per_buffer, skip_first: As for `LiveSource`.
        dtype: Of the model; its own by default.
    """

    store: str | None = None
    model: str | None = None
    tokens: str | None = None
    length: int | None = None
    texts_per_buffer: int = 256
    skip_first: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.store is not None:
            given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "store"}
            if extra := [f.name for f in dataclasses.fields(self) if given.get(f.name, f.default) != f.default]:
                raise ValueError(
                    f"a store holds activations already, so {', '.join(extra)} would not be used; give the store, or "
                    f"model and tokens"
                )
        elif self.model is None or self.tokens is None:
            raise ValueError(
                f"model={self.model!r}, tokens={self.tokens!r}, store=None: training needs data.store, or a model and "
                f"data.tokens"
            )

    def open(
        self, hooks: Sequence[str], *, gradient_of: str | None = None, device: Any = None
    ) -> ActivationStore | LiveSource:
        """The store, or the model with its tokens, once it is known that it has these hooks; with the gradient of its
        loss at one of them, if a gradient dictionary is to be trained (see `LiveSource`).

        Raises:
            FileNotFoundError, KeyError, ValueError: If something is missing, before any forward.
        """
        if self.store is not None:
            store = ActivationStore(self.store)
            if missing := [name for name in hooks if name not in store.hooks]:
                raise ValueError(f"{self.store} holds {', '.join(store.hooks)}; {', '.join(missing)} is not among them")
            return store
        assert self.model is not None and self.tokens is not None
        if not Path(self.tokens).is_file():  # before a model is loaded
            raise FileNotFoundError(f"no file {self.tokens!r} with tokens")
        bridge = load_model(self.model, device=local_device(device), dtype=self.dtype, check=False)
        names = tuple(resolve(bridge, name) for name in dict.fromkeys(hooks))
        tokens = read_tokens(self.tokens, bridge.tokenizer, length=self.length)
        return LiveSource(
            bridge,
            tokens,
            names,
            texts_per_buffer=self.texts_per_buffer,
            skip_first=self.skip_first,
            gradient_of=gradient_of,
        )

    def open_for(self, configs: Iterable[TrainingConfig], *, device: Any = None) -> ActivationStore | LiveSource:
        """`open`, with what these configurations need."""
        configs = list(configs)
        places = {
            str(config.dictionary.get("target_hook") or config.dictionary.get("hook"))
            for config in configs
            if ARCHITECTURES[config.dictionary["architecture"]].needs_gradient
        }
        if len(places) > 1:
            raise ValueError(
                f"gradient dictionaries of {', '.join(sorted(places))}: a model is differentiated at one hook at a "
                f"time; train them separately"
            )
        return self.open(hooks_of(configs), gradient_of=next(iter(places), None), device=device)


@dataclass(frozen=True)
class TrainingFile:
    """What a file asks for: `runs` by name, "" being the only one of a file without a grid."""

    out: Path
    data: TrainingData
    runs: Mapping[str, TrainingConfig]

    @property
    def hooks(self) -> list[str]:
        return hooks_of(self.runs.values())

    def open(self, *, device: Any = None) -> ActivationStore | LiveSource:
        """The activations that all runs need."""
        return self.data.open_for(self.runs.values(), device=device)


def read_training_file(path: str | Path, *, out: str | Path | None = None) -> TrainingFile:
    """Read and check a file, before any model is loaded.

    Args:
        out: In place of the file's.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not JSON or TOML, or has names or values that mean nothing, saying which.
    """
    path = Path(path)
    try:
        return _parsed(_read(path), path.absolute().parent, out)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def training_record(config: TrainingConfig, data: TrainingData) -> dict[str, Any]:
    """A run as `read_training_file` reads it back from a file in the run's own folder."""
    values = config.to_dict()
    dictionary = values.pop("dictionary")
    found: dict[str, Any] = {"out": "."}
    for name in ("hook", "target_hook"):
        if (hook := dictionary.pop(name, None)) is not None:
            found[name] = hook
    plain = {name: value for name, value in dataclasses.asdict(data).items() if value is not None}
    for name in ("store", "tokens"):
        if name in plain:
            plain[name] = str(Path(plain[name]).absolute())
    if data.store is not None:
        plain = {"store": plain["store"]}
    if "model" in plain:
        model = found["model"] = plain.pop("model")
        if model.startswith((".", "~")) or ("/" in model and Path(model).is_dir()):
            found["model"] = str(Path(model).expanduser().absolute())
    return json.loads(json.dumps({**found, "data": plain, "dictionary": dictionary, "training": values}))


def grid(base: TrainingConfig, axes: Mapping[str, Sequence[Any]]) -> dict[str, TrainingConfig]:
    """One configuration per combination of values, by a name made of them, such as `"k=16,seed=0"`.

    Args:
        axes: Values by setting: of `TrainingConfig` by its name, of the dictionary as `"dictionary.k"`; `"seed"` is
            both seeds, that of the batches and that of the initial weights.

    Raises:
        ValueError: For settings that there are not, values that cannot be, or two combinations of one name.
    """
    if not axes or not all(axes.values()):
        raise ValueError(f"a grid needs values for every axis; got {dict(axes)}")
    short = [axis.rpartition(".")[2] for axis in axes]
    labels = short if len(set(short)) == len(short) else list(axes)
    found: dict[str, TrainingConfig] = {}
    for values in product(*axes.values()):
        settings = base.to_dict()
        for axis, value in zip(axes, values, strict=True):
            within, _, name = axis.rpartition(".")
            if axis == "seed":
                settings["seed"] = settings["dictionary"]["seed"] = value
            elif within == "dictionary":
                settings["dictionary"][name] = value
            elif within or axis in ("dictionary", "notes"):
                raise ValueError(
                    f'{axis!r} is no axis of a grid; expected a setting of TrainingConfig, "seed", or "dictionary.NAME"'
                )
            else:
                settings[axis] = value
        name = ",".join(f"{label}={_as_name(value)}" for label, value in zip(labels, values, strict=True))
        if name in found:
            raise ValueError(f"two combinations of the grid are both called {name!r}")
        found[name] = TrainingConfig.from_dict(_typed(settings))
        check_dictionary(found[name])
    return found


def check_dictionary(config: TrainingConfig) -> None:
    """Refuse settings that no dictionary has before any activations are read, on one as small as can be."""
    settings = dict(config.dictionary)
    if settings.get("target_hook") is not None:
        settings["d_out"] = 1
    else:
        settings.pop("d_out", None)
    build({**settings, "d_in": 1})


def hooks_of(configs: Iterable[TrainingConfig]) -> list[str]:
    """The hooks that these configurations read or rebuild, each once."""
    found = [config.dictionary.get(name) for config in configs for name in ("hook", "target_hook")]
    return list(dict.fromkeys(hook for hook in found if hook))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no training file {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        return tomllib.loads(text)
    raise ValueError(f"a training file ends in .toml or .json, not in {path.suffix or 'nothing'!r}")


def _parsed(values: Any, folder: Path, out: str | Path | None) -> TrainingFile:
    _table("the file", values, _TOP)
    for name in ("hook", "data", "dictionary"):
        if name not in values:
            raise ValueError(f"{name} is missing; there are {', '.join(values) or 'no settings'}")
    data_names = tuple(f.name for f in dataclasses.fields(TrainingData) if f.name != "model")
    _table("data", values["data"], data_names)
    _table("dictionary", values["dictionary"], None)
    training = values.get("training", {})
    _table("training", training, tuple(f.name for f in dataclasses.fields(TrainingConfig) if f.name != "dictionary"))
    if inside := [name for name in ("hook", "target_hook", "d_in") if name in values["dictionary"]]:
        raise ValueError(
            f"[dictionary] has {', '.join(inside)}: hook and target_hook stand at the top, widths are read off the data"
        )
    if out is None and "out" not in values:
        raise ValueError("out is missing: the folder for the state and the dictionary")
    where = Path(out).absolute() if out is not None else (folder / Path(_text("out", values["out"])).expanduser())
    hooks = {name: _text(name, values[name]) for name in ("hook", "target_hook") if name in values}
    data = dict(values["data"]) | ({"model": values["model"]} if "model" in values else {})
    for name in ("store", "tokens", "model"):
        if name in data:
            _text(name, data[name])
            if name != "model" or data[name].startswith((".", "~")):
                data[name] = str((folder / Path(data[name]).expanduser()).resolve())
    _check_types("data", TrainingData, data)
    dictionary = {**values["dictionary"], **hooks}
    base = TrainingConfig.from_dict(_typed({**training, "dictionary": dictionary}))
    check_dictionary(base)
    runs = {"": base}
    if "grid" in values:
        _table("grid", values["grid"], None)
        runs = grid(base, {_axis(name): _values(name, axis) for name, axis in values["grid"].items()})
    return TrainingFile(where, TrainingData(**data), runs)


def _axis(name: str) -> str:
    """A grid's axis in a file, where hooks and training settings stand elsewhere than in a configuration."""
    return f"dictionary.{name}" if name in ("hook", "target_hook") else name.removeprefix("training.")


def _values(name: str, axis: Any) -> list[Any]:
    if not isinstance(axis, list):
        raise ValueError(f"grid: {name} is {axis!r}; expected a list of values")
    return axis


def _table(what: str, values: Any, known: tuple[str, ...] | None) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {values!r}; expected a table of settings")
    if known is not None and (unknown := sorted(set(values) - set(known))):
        raise ValueError(f"{what} has no setting {', '.join(unknown)}; there are {', '.join(known)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}; expected text")
    return value


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a `TrainingConfig` with whole numbers made floats where floats belong, and other types refused."""
    return _check_types("training", TrainingConfig, settings)


def _check_types(what: str, cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    hints, found = get_type_hints(cls), dict(settings)
    for name, value in settings.items():
        hint = hints.get(name)
        kinds = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
        if float in kinds and type(value) is int:
            found[name] = value = float(value)
        basic = kinds & {int, float, str, NoneType}
        if basic and basic == kinds and type(value) not in basic:
            expected = " or ".join(sorted(str(kind.__name__) for kind in (int, float, str) if kind in basic))
            raise ValueError(f"{what}: {name} is {value!r}; expected {expected}")
    return found


def _as_name(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)
