"""The depth study: tangents of modules, its tables, and that a model without the task is not compared."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.patching import Rules

pytestmark = pytest.mark.filterwarnings(  # by torch itself, when its forward-mode derivatives are first used
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)
EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = importlib.import_module("depth_study")
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "RESAMPLES", 100)
    chosen = ("AtP", "RelP", "LN alone", "Half alone")
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in chosen})
    return module


def trained(study: ModuleType, work: Path, arch: str, layers: int = 2) -> Path:
    size = study.training.Size(d_model=16, heads=2, kv_heads=1, d_mlp_gpt=32, d_mlp_llama=24, context=32)
    arguments = argparse.Namespace(arch=arch, tokens=32 * 4 * 3, lr=1e-3, answer_weight=2.0, seed=0, work=work)
    return study.train(arguments, layers, size)


def roughened(directory: Path) -> Any:
    """The model with weights so large that every module is curved; initial ones are nearly linear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval().double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("arch", ["gpt", "llama"])
def test_linear_modules_make_patching_first_order_and_true_ones_make_it_exact(
    arch: str, study: ModuleType, tmp_path: Path
) -> None:
    model = roughened(trained(study, tmp_path, arch))
    tokenizer = tmp_path / f"{arch}-2"
    bridge = interp.load_model(model, tokenizer=tokenizer, check=False)
    prompts = interp.prompts.ioi(bridge, n=4, template=0)
    metric = interp.metrics.logit_difference(prompts)
    first_order = interp.patching.attribution_patch(bridge, prompts, metric, sites=study.linearised.SITES)
    for site in study.linearised.SITES:
        exact = interp.patching.activation_patch(bridge, prompts, metric, site=site)
        ours = study.linearised.effects(model, prompts, metric, site)
        np.testing.assert_allclose(ours, exact.values.transpose("layer", "pos", "example"), atol=1e-5, rtol=1e-5)
        tangents = study.linearised.effects(model, prompts, metric, site, study.linearised.KINDS)
        scores = first_order[site].values.transpose("layer", "pos", "example").values
        np.testing.assert_allclose(tangents, scores, atol=1e-5, rtol=1e-5)
        assert np.abs(tangents - ours).max() > 0.01  # or the two would be the same test
        for kind in study.linearised.KINDS:
            alone = study.linearised.effects(model, prompts, metric, site, [kind])
            assert np.abs(alone - ours).max() > 1e-4 and np.abs(alone - tangents).max() > 1e-4
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_linearised_refuses_other_sites(study: ModuleType, tmp_path: Path) -> None:
    model = roughened(trained(study, tmp_path, "gpt", 1))
    bridge = interp.load_model(model, tokenizer=tmp_path / "gpt-1", check=False)
    prompts = interp.prompts.ioi(bridge, n=2, template=0)
    with pytest.raises(ValueError, match="'z'; expected one of"):
        study.linearised.effects(model, prompts, interp.metrics.logit_difference(prompts), "z")


def test_tables_hold_every_method_site_and_layer(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = trained(study, tmp_path, "llama")
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert trained(study, tmp_path, "llama") == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before  # a finished model is not trained again

    unlearned = study.compare(directory, n=4, seed=0, modules=2)
    assert [len(unlearned[name]) for name in study.TABLES] == [2, 0, 0, 0]
    assert not any(row["learned"] for row in unlearned["models"])

    monkeypatch.setattr(study, "LEARNED", 0.0)
    tables = study.compare(directory, n=4, seed=0, modules=2)
    other = {name: [{**row, "layers": 1, "seed": 7} for row in rows] for name, rows in tables.items()}
    for part in (tables, other, tables):  # a model measured again replaces its own rows and no others
        study.write(part, tmp_path / "data")
    both = pd.read_csv(tmp_path / "data" / "agreement.csv")
    assert both.groupby("seed").size().to_dict() == {0: 24, 7: 24} and list(both.layers) == sorted(both.layers)
    frames = {name: pd.read_csv(tmp_path / "data" / f"{name}.csv").query("seed == 0") for name in study.TABLES}
    assert set(frames["models"].corruption) == {"s2_io_flip", "abc"} and frames["models"].learned.all()
    rows = frames["agreement"].set_index(["corruption", "site", "method"])
    assert len(rows) == 2 * 3 * 4 and rows.index.is_unique
    assert ((rows.pearson_low <= rows.pearson) & (rows.pearson <= rows.pearson_high)).all()
    assert len(frames["layers"]) == 2 * 3 * 2 * 2 and set(frames["layers"].method) == {"AtP", "RelP"}
    share = frames["layers"].groupby(["corruption", "site", "method"]).share.sum()
    np.testing.assert_allclose(share, 1, atol=1e-3)
    modules = frames["modules"].set_index(["corruption", "site", "linear"])
    assert len(modules) == 2 * 3 * 4 and modules.index.is_unique and (modules.error > 0).all()
    card = importlib.import_module("depth_card").card(tmp_path / "data")
    row = rows.loc["abc", "mlp_out", "RelP"]
    assert f"{row.pearson:.3f} [{row.pearson_low:.3f}, {row.pearson_high:.3f}]" in card and "1 and 2 layers" in card


def test_no_gate_no_half(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = trained(study, tmp_path, "gpt")
    monkeypatch.setattr(study, "LEARNED", 0.0)
    monkeypatch.setattr(study, "CORRUPTIONS", ("abc",))
    methods = {row["method"] for row in study.compare(directory, n=4, seed=0, modules=0)["agreement"]}
    assert methods == {"AtP", "RelP", "LN alone"}
    record = json.loads((directory / "trained.json").read_text())
    assert record["architecture"] == "GPT2LMHeadModel" and record["layers"] == 2 and record["tokens"] == 384


def test_error_and_correlation_by_hand(study: ModuleType) -> None:
    exact = np.array([[1.0, 3.0], [0.0, 0.0], [-2.0, -2.0]])
    found = study.compared(exact, exact / 2)
    assert found["pearson"] == found["pearson_low"] == pytest.approx(1)
    assert found["error"] == found["slope_high"] == pytest.approx(0.5)
    assert study.compared(exact, -exact)["pearson"] == pytest.approx(-1)
    assert np.isnan(study.compared(exact, np.ones_like(exact))["pearson"])


def test_rules_of_a_single_kind(study: ModuleType) -> None:
    plain = Rules().to_dict()
    alone = importlib.import_module("depth_study").METHODS["LN alone"]["method"].to_dict()
    assert [key for key in plain if plain[key] != alone[key]] == ["norm"]
