"""Training: the same bits after a kill, the same dictionaries alone and together, refusals before any step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.dictionaries import _files, training
from interp.dictionaries._run import Run, geometric_median
from interp.dictionaries.planted import PlantedSource
from interp.dictionaries.training import TrainingDiverged, dry_run, train, train_many
from interp.dictionaries.training_config import TrainingConfig

D, H, N = 8, 16, 24
BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "relu": {"coefficient": 0.1},
    "gated": {"coefficient": 0.1},
    "jumprelu": {"coefficient": 0.1},
    "topk": {"k": 2},
    "batch_topk": {"k": 2},
    "matryoshka": {"k": 2, "widths": [4, H]},
    "mutual_choice": {"k": 2},
    "feature_choice": {"k": 2},
}


def activations(n: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def config(
    architecture: str = "topk", *, dictionary: Mapping[str, Any] | None = None, **options: Any
) -> TrainingConfig:
    settings = {"architecture": architecture, "n_latents": H, **BY_ARCHITECTURE[architecture], **(dictionary or {})}
    standard: dict[str, Any] = {"n_steps": 12, "batch_size": N, "learning_rate": 1e-2, "dead_after": 60, "log_every": 3}
    return TrainingConfig(settings, **{**standard, **options})


class Killed(Exception):
    pass


class Interrupted:
    """A source that is cut off before batch `at`."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.at, self.hooks = inner, at, inner.hooks

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        for number, batch in enumerate(self.inner.batches(batch_size, seed=seed, start=start), start):
            if number >= self.at:
                raise Killed
            yield batch


def final(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _files.read_tensors(path / "state.safetensors")


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
@pytest.mark.parametrize("at", [5, 9])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(architecture: str, at: int, tmp_path: Path) -> None:
    """Weights, buffers, Adam's moments, counts, history, whatever the step (A8)."""
    target = {"target_l0": 2.0} if architecture in ("relu", "gated", "jumprelu") else {}
    c = config(
        architecture,
        dictionary={"normalisation": "mean_norm"},
        checkpoint_every=2,
        bias_start="mean",
        warmup_steps=3,
        resample_every=2 if architecture == "relu" else None,
        **target,
    )
    source = PlantedSource(width=D, n_features=12, density=0.2)
    train(c, source, path=tmp_path / "whole")
    with pytest.raises(Killed):
        train(c, Interrupted(source, at), path=tmp_path / "killed")
    train(c, source, path=tmp_path / "killed")
    (whole, record), (killed, again) = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert whole.keys() == killed.keys() and record == again
    assert {name.split(".")[-1] for name in whole} >= {"exp_avg", "exp_avg_sq", "W_enc", "silent"}
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    results = [_files.read_tensors(tmp_path / kind / "dictionary.safetensors") for kind in ("whole", "killed")]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


def test_a_kill_while_writing_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c, x = config(checkpoint_every=2), activations()
    train(c, x, path=tmp_path / "whole")
    real, calls = _files.save_file, []

    def torn(tensors: Any, path: str, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise Killed
        real(tensors, path, metadata)

    monkeypatch.setattr(_files, "save_file", torn)
    with pytest.raises(Killed):
        train(c, x, path=tmp_path / "killed")
    monkeypatch.undo()
    assert final(tmp_path / "killed")[1]["step"] == 4
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["state.safetensors"]
    train(c, x, path=tmp_path / "killed")
    assert all(torch.equal(a, final(tmp_path / "killed")[0][n]) for n, a in final(tmp_path / "whole")[0].items())


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    c, x = config(), activations()
    first = train(c, x, path=tmp_path)
    written = (tmp_path / "state.safetensors").stat().st_mtime_ns
    again = train(c, x, path=tmp_path)
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert again.metadata["history"] == first.metadata["history"]
    other = train(replace(c, n_steps=3), x, path=tmp_path, resume=False)
    assert final(tmp_path)[1]["step"] == 3 and not torch.equal(other.W_dec, first.W_dec)


def test_other_settings_and_other_data_are_refused(tmp_path: Path) -> None:
    c, x = config(), activations()
    train(c, x, path=tmp_path)
    with pytest.raises(ValueError, match="dictionary.k is 2 there and 3 here"):
        train(config(dictionary={"k": 3}), x, path=tmp_path)
    changed = x.clone()
    changed[3:5] = x[[4, 3]]  # even in another order, with the same ends and sum
    for other in (activations(seed=1), changed):
        with pytest.raises(ValueError, match="other data"):
            train(c, other, path=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="damaged"):
        train(c, x, path=tmp_path)


def test_together_each_is_what_it_is_alone(tmp_path: Path) -> None:
    configs = [config("topk"), config("relu", resample_every=4), config("topk", dictionary={"seed": 3, "k": 4})]
    x = activations()
    alone = [train(c, x) for c in configs]
    together = train_many(configs, x, paths=[tmp_path / "a", None, tmp_path / "b"])
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(together[0].W_dec, together[2].W_dec)
    assert not (tmp_path / "None").exists()


def test_runs_at_different_steps_catch_up(tmp_path: Path) -> None:
    x, c = activations(), config(checkpoint_every=1)
    other = config(checkpoint_every=1, dictionary={"seed": 1})
    with pytest.raises(Killed):
        train(c, Interrupted(training.as_source(x, "", None), 7), path=tmp_path / "a")
    train_many([c, other], x, paths=[tmp_path / "a", tmp_path / "b"])
    for settings, name in ((c, "a"), (other, "b")):
        expected = train(settings, x)
        found = final(tmp_path / name)[0]
        assert torch.equal(found["dictionary.W_dec"], expected.W_dec.detach())


def test_a_batch_by_hand_is_a_plain_step_of_adam() -> None:
    x, c = activations(), config(n_steps=1, clip=None, decay=0.0)
    trained = train(c, x)
    fresh = training.build({**c.dictionary, "d_in": D})
    adam = torch.optim.Adam(fresh.parameters(), lr=1e-2)
    batch = next(training.as_source(x, "", None).batches(N, seed=0))[""]
    fresh.step(batch).loss.backward()
    adam.step()
    for p, q in zip(trained.parameters(), fresh.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)


def test_nan_stops_with_the_last_good_state(tmp_path: Path) -> None:
    class Poisoned(Interrupted):
        def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
            for number, batch in enumerate(self.inner.batches(batch_size, seed=seed, start=start), start):
                yield {name: x * float("nan") if number == self.at else x for name, x in batch.items()}

    source = training.as_source(activations(), "", None)
    with pytest.raises(TrainingDiverged, match="step 7: the loss is nan; the state of step 6"):
        train(config(checkpoint_every=3), Poisoned(source, 7), path=tmp_path)
    tensors, record = final(tmp_path)
    assert record["step"] == 6 and all(bool(t.isfinite().all()) for t in tensors.values())


def test_weights_that_blew_up_never_replace_a_good_state(tmp_path: Path) -> None:
    c = config(clip=None, checkpoint_every=1, learning_rate=1e38, n_steps=3)
    with pytest.raises(TrainingDiverged, match="not finite"):
        train(c, activations(), path=tmp_path)
    assert not (tmp_path / "state.safetensors").exists()


def test_one_that_diverges_does_not_take_the_others_along(tmp_path: Path) -> None:
    wild = config("relu", dictionary={"coefficient": 1e38}, checkpoint_every=100)
    calm = config("topk", checkpoint_every=100)
    with pytest.raises(TrainingDiverged):
        train_many([calm, wild], activations(), paths=[tmp_path / "calm", tmp_path / "wild"])
    assert final(tmp_path / "calm")[1]["step"] >= 1 and not (tmp_path / "wild").exists()


def test_numbers_of_numpy_are_settings_too(tmp_path: Path, unchecked: None) -> None:
    settings = {"k": np.int64(2), "dtype": torch.float64}
    train(config(dictionary=settings, checkpoint_every=1), activations().double(), path=tmp_path)
    assert final(tmp_path)[1]["config"]["dictionary"]["k"] == 2
    with pytest.raises(ValueError, match="cannot be written"):
        train(config(notes={"what": object()}), activations())


def test_rates_rise_and_fall() -> None:
    c = config(n_steps=100, warmup_steps=10, decay=0.2, sparsity_warmup_steps=20, learning_rate=1.0)
    assert [c.rate(s) for s in (0, 4, 9, 50, 79)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [c.rate(s) for s in (80, 90, 99)] == pytest.approx([1.0, 0.5, 0.05])
    assert [c.sparsity(s) for s in (0, 9, 19, 99)] == [0.05, 0.5, 1.0, 1.0]


def test_history_says_what_happened() -> None:
    source = PlantedSource(width=D, n_features=12, density=0.2)
    history = train(config("relu", n_steps=31, log_every=10), source).metadata["history"]
    assert [entry["step"] for entry in history] == [10, 20, 30, 31]
    assert history[-1]["loss"] < history[0]["loss"]
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["loss_reconstruction"] + entry["loss_sparsity"], rel=1e-5)
        assert 0 < entry["fvu"] < 2 and 0 < entry["l0"] <= H and entry["coefficient"] == 0.1


def test_dead_latents_are_counted_in_tokens_and_resampled(tmp_path: Path) -> None:
    c = config("relu", n_steps=8, dead_after=2 * N, resample_every=4, log_every=1)
    source = training.as_source(activations(), "", None)
    run = Run(
        replace(c, dictionary={**c.dictionary, "d_in": D}),
        training.build({**c.dictionary, "d_in": D}),
        source,
        None,
        resume=False,
    )
    with torch.no_grad():
        run.dictionary.b_enc[5] = -100.0
    batches = source.batches(N, seed=0)
    for i in range(1, 4):
        run.advance(next(batches))
        assert int(run.silent[5]) == i * N
    assert run.history[-1]["dead"] >= 1 / H
    before = run.dictionary.W_dec[5].detach().clone()
    run.advance(next(batches))  # the fourth: replaced
    assert int(run.silent[5]) == 0 and float(run.dictionary.b_enc[5].detach()) == 0
    assert not torch.allclose(run.dictionary.W_dec[5], before)
    assert float(run.optimiser.state[run.dictionary.W_dec]["exp_avg"][5].abs().max()) == 0
    assert float(run.optimiser.state[run.dictionary.W_enc]["exp_avg"][:, 5].abs().max()) == 0
    run.advance(next(batches))
    assert int(run.silent[5]) == 0  # it fires


def test_a_dry_run_counts_and_changes_nothing(tmp_path: Path) -> None:
    x = activations()
    before = x.clone()
    found = dry_run([config(), config("relu")], x, steps=1)
    parameters = 2 * (2 * D * H + H + D)
    assert found.parameters == parameters and found.bytes == 16 * parameters and found.seconds > 0
    assert torch.equal(x, before) and "tokens/s" in str(found)


def test_the_geometric_median_withstands_outliers() -> None:
    points = torch.randn(201, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.cat([points, torch.full((20, 3), 1e4, dtype=torch.float64)])
    assert float((geometric_median(moved) - points.median(0).values).abs().max()) < 0.5
    square = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    assert torch.allclose(geometric_median(square), torch.ones(2), atol=1e-4)


def test_a_configuration_survives_a_file() -> None:
    c = config("relu", target_l0=3.0, betas=(0.0, 0.99))
    assert TrainingConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    with pytest.raises(ValueError, match="has no n_epochs"):
        TrainingConfig.from_dict({**c.to_dict(), "n_epochs": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"warmup_steps": 13}, "warmup_steps=13"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"target_l0": -1.0}, "target_l0=-1.0"),
        ({"dead_after": 0}, "dead_after=0"),
        ({"bias_start": "median"}, "geometric_median"),
    ],
)
def test_configurations_are_checked(change: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_what_does_not_fit_together_is_refused() -> None:
    x = activations()
    with pytest.raises(ValueError, match="no sparsity coefficient to steer"):
        train(config(target_l0=3.0), x)
    with pytest.raises(ValueError, match="differ in batch_size"):
        train_many([config(), config(batch_size=12)], x)
    with pytest.raises(ValueError, match="1 paths for 2"):
        train_many([config(), config()], x, paths=["a"])
    with pytest.raises(ValueError, match="one folder"):
        train_many([config(), config()], x, paths=["a", "a"])
    with pytest.raises(ValueError, match="the activations are 8 wide"):
        train(config(dictionary={"d_in": 9}), x)
    with pytest.raises(ValueError, match="needs? .*pair of tensors|pair of tensors"):
        train(config(dictionary={"target_hook": "b"}), x)
    with pytest.raises(ValueError, match="for transcoders"):
        train(config(), (x, x))
    with pytest.raises(ValueError, match="batches of 24 from 10 rows"):
        train(config(), x[:10])
    with pytest.raises(TypeError, match="a list"):
        train(config(), [x])
    with pytest.raises(ValueError, match="n_latents"):
        TrainingConfig({"architecture": "topk"})
