"""The self-check passes on every family and finds each thing that can be broken. It raises nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

import interp
from interp.models import CheckReport, load_model, self_check
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_model, tiny_tokenizer
from tests.models.test_load import saved

EXACT = tuple(family for family in FAMILIES + MORE_FAMILIES if family not in ("gpt_neo", "gptj", "opt"))


def rows(report: CheckReport) -> dict[str, str]:
    return {row.name: row.status for row in report.rows}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "float32") for family in FAMILIES + MORE_FAMILIES]
    + [(family, kind) for family in (*FAMILIES, "qwen3", "gptj") for kind in ("bfloat16", "processed", "memory")],
)
def test_every_family_passes(family: str, kind: str) -> None:
    if kind == "memory":
        bridge = load_model(tiny_model(family), tokenizer=tiny_tokenizer(), check=False)
    elif kind == "processed":
        bridge = load_model(saved(family), processed=True, check=False)
    else:
        bridge = load_model(saved(family), dtype=kind, check=False)
    report = self_check(bridge)
    assert report.ok, str(report)
    assert set(rows(report).values()) <= ({"ok"} if family in EXACT else {"ok", "warn"}), str(report)


def test_the_report_reads_well() -> None:
    report = self_check(load_model(saved("llama"), check=False))
    text = str(report)
    assert text.startswith("self-check of llama: ok (")
    assert len(text.splitlines()) == len(report.rows) + 1 == len(report.to_dataframe()) + 1
    assert "\n" not in report.summary
    assert report.summary.startswith("llama: 3 layers, d_model 32, 4 heads on 2 key-value heads, RMSNorm, gated MLP")
    assert "raw float32 on cpu" in report.summary or "raw float32 on cuda" in report.summary
    assert list(report.to_dataframe().columns) == ["name", "status", "value", "detail"]


def test_changed_weights_no_longer_match_transformers() -> None:
    bridge = load_model(saved("gpt2"), check=False)
    with torch.no_grad():
        bridge.original_model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    report = self_check(bridge)
    assert rows(report)["logits"] == "fail" and not report.ok
    assert "FAILED: logits" in report.summary


def test_infinite_weights_are_found() -> None:
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        bridge.original_model.get_output_embeddings().weight[3] = torch.inf
    assert rows(self_check(bridge))["finite"] == "fail"


def test_a_part_added_outside_the_hooks_breaks_the_residual_sum() -> None:
    bridge = fresh_bridge("llama")
    handle = bridge.blocks[1].original_component.register_forward_hook(lambda module, args, output: output + 1)
    try:
        status = rows(self_check(bridge))
    finally:
        handle.remove()
    assert status["residual sum"] == "fail"
    assert rows(self_check(bridge))["residual sum"] == "ok"


def test_a_pattern_that_sees_the_future_is_found() -> None:
    bridge = fresh_bridge("gpt2")
    for block in bridge.blocks:
        object.__setattr__(block.attn, "_apply_reconstruct_attention_mask", lambda attn_scores, **kwargs: attn_scores)
    assert rows(self_check(bridge))["pattern"] == "fail"


def test_training_mode_and_gradients_are_found() -> None:
    bridge = fresh_bridge("gpt2")
    bridge.requires_grad_(True)
    assert rows(self_check(bridge))["mode"] == "warn"
    bridge.train()
    report = self_check(bridge)
    assert rows(report)["mode"] == "fail"
    assert bridge.training  # found as it was, left as it was


def test_a_wrong_record_of_the_dtype_is_found() -> None:
    """TransformerLens records dtype and device of a wrapped model without applying them."""
    bridge = fresh_bridge("llama")
    bridge.cfg.dtype = torch.bfloat16
    report = self_check(bridge)
    assert rows(report)["weights"] == "fail"
    assert "raw float32 on cpu" in report.summary


def test_delegated_attention_is_listed_as_unsupported() -> None:
    report = self_check(tiny_bridge("gptj"))
    edits = next(row for row in report.rows if row.name == "hook edits")
    assert (edits.status, edits.value) == ("warn", "9 of 11 sites")
    assert edits.detail == "unsupported: resid_mid: not on this model; pattern: an edit has no effect"
    assert "note: hook edits" in report.summary


def test_bos_twice_and_a_foreign_tokenizer_are_found() -> None:
    bridge = fresh_bridge("llama")
    bridge.cfg.tokenizer_prepends_bos = False  # TransformerLens would now add a second one
    assert rows(self_check(bridge))["bos"] == "fail"

    small = load_model(tiny_model("llama", vocab_size=30), tokenizer=tiny_tokenizer(), check=False)
    report = self_check(small)
    assert rows(report)["vocabulary"] == "fail"
    assert next(row for row in report.rows if row.name == "vocabulary").value == "id 59 of 30"


def test_no_tokenizer_is_a_warning() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_model("llama")
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config).eval()
    bridge.requires_grad_(False)
    report = self_check(bridge)
    assert rows(report)["bos"] == "warn" and rows(report)["logits"] == "skip"
    assert report.ok


def test_nothing_is_raised_even_if_nothing_works() -> None:
    bridge = fresh_bridge("gpt2")

    def broken(*args, **kwargs):
        raise RuntimeError("no forward today")

    object.__setattr__(bridge, "forward", broken)
    report = self_check(bridge)
    assert not report.ok
    assert any(row.detail == "no forward today" for row in report.rows)


def test_large_models_are_compared_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.models import check

    monkeypatch.setattr(check, "_SMALL", 10)
    bridge = load_model(saved("llama"), check=False)
    skipped = self_check(bridge)
    assert rows(skipped)["logits"] == "skip" and "full=True" in str(skipped)
    assert rows(self_check(bridge, full=True))["logits"] == "ok"


def test_nothing_is_left_behind() -> None:
    bridge = load_model(saved("neox"), check=False)
    state = torch.random.get_rng_state()
    before = [(len(point._forward_hooks), len(point.fwd_hooks)) for point in bridge.hook_points()]
    filters = list(warnings.filters)
    assert interp.self_check(bridge).ok
    assert [(len(point._forward_hooks), len(point.fwd_hooks)) for point in bridge.hook_points()] == before
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(warnings.filters) == filters
