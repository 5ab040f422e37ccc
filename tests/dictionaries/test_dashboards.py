"""Dashboards: planted activations on the page, the index in a browser, files that are whole or not there."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp.dictionaries import (
    SNMF,
    Dashboard,
    TokenRows,
    TopKSAE,
    auroc,
    dashboard,
    label_features,
    output_tokens,
    token_rows,
)
from interp.dictionaries._dashboard_columns import Columns
from interp.dictionaries._dashboard_contexts import Places, bands, cluster_facets, label_facets
from interp.dictionaries._dashboard_labels import LabelScores
from interp.dictionaries.reading import _document_draws, _weighted_auroc
from interp.hooks import hook_name
from interp.models import provenance
from interp.neurons import contexts_of
from interp.plotting import find_browser
from interp.plotting.latent_index import Column, LatentIndex
from interp.plotting.latent_page import Context, ContextGroup, LatentPage
from tests.helpers import D_MLP, D_MODEL, D_VOCAB, FAMILIES, N_LAYERS, tiny_bridge, tiny_tokens

LAST = N_LAYERS - 1
STREAM = hook_name("resid_post", LAST)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream_rows(family: str = "llama", documents: int = 12, length: int = 20) -> TokenRows:
    return token_rows(tiny_bridge(family), tiny_tokens(documents, length), STREAM, skip_tokens=[0])


def sparse_activations(n_tokens: int, n_units: int = 6, seed: int = 1) -> torch.Tensor:
    """Non-negative, about one in eight not zero; the last unit is dead."""
    found = noise(n_tokens, n_units, seed=seed).sub(1.1).relu()
    found[:, -1] = 0
    return found


@pytest.mark.parametrize("few", [True, False])
def test_columns_are_the_matrix(few: bool) -> None:
    dense = sparse_activations(200, 7) if few else noise(200, 7)
    columns = Columns.of(torch.zeros(200, 1), dense, threshold=0.25, batch_size=33)
    assert columns._sparse is few
    assert np.array_equal(columns.block([5, 0, 2]), dense[:, [5, 0, 2]].numpy())
    tokens, values = columns.entries(3)
    assert tokens.tolist() == dense[:, 3].nonzero()[:, 0].tolist() and np.array_equal(values, dense[tokens, 3].numpy())
    fires = (dense > 0.25 * dense.amax(0).clamp(min=0)) & (dense > 0)
    assert columns.fires.tolist() == fires.sum(0).tolist()
    assert np.array_equal(columns.together([4, 1]), (fires[:, [4, 1]].int().T @ fires.int()).numpy())
    with np.errstate(invalid="ignore"):
        wanted = np.corrcoef(dense.double().numpy().T)[[4, 1, 6]]
    np.testing.assert_allclose(columns.correlations([4, 1, 6]), wanted, atol=1e-6)
    assert np.isnan(wanted[2]).all() == few  # the dead unit goes with none


def test_activations_made_in_batches_are_those_of_a_matrix() -> None:
    values, weight = noise(100, 8), noise(8, 5, seed=3)
    sizes: list[int] = []

    def encode(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return (rows @ weight - 4).relu()

    columns = Columns.of(values, encode, threshold=0.0, batch_size=32)
    assert sizes == [32, 32, 32, 4]
    np.testing.assert_allclose(columns.block(range(5)), (values @ weight - 4).relu().numpy(), atol=1e-6)


def test_a_page_shows_what_was_planted() -> None:
    """Unit 2 fires on the token w7 alone; 4 beside it; unit 5 never."""
    rows, bridge = stream_rows(), tiny_bridge("llama")
    acts = sparse_activations(len(rows)) * 0.5
    on = rows.ids == 7
    acts[:, 2] = on * torch.linspace(1, 3, len(rows))
    acts[:, 4] = 2 * acts[:, 2] + 0.01 * noise(len(rows), seed=5).abs() * on
    directions = noise(6, D_MODEL, seed=2)
    directions[3] = 3 * directions[2] + 0.01 * directions[3]
    page = dashboard(bridge, rows, acts, directions=directions).show(2)

    tokens = page.table("Tokens it fires on")
    assert tokens["token"].tolist() == ["w7"] and tokens["fires"].tolist() == tokens["of"].tolist() == [int(on.sum())]
    assert page.table("Nearest")["unit"][0] == "unit 3" and page.table("Nearest")["cosine"][0] > 0.99
    beside = page.table("Most co-active").iloc[0]
    assert beside["unit"] == "unit 4" and beside["fires with it"] == 1.0 and beside["correlation"] > 0.99
    wanted = np.histogram(acts[on, 2].double().numpy(), bins=np.linspace(0, float(acts[:, 2].max()), 41))[0]
    assert np.array_equal(page.counts, wanted) and page.counts.sum() == int(on.sum())
    assert page.off == pytest.approx(1 - float(on.float().mean()))

    best = contexts_of(acts, rows.tokens, n=20, window=(12, 5), once="context", keep=rows.keep, bridge=bridge)
    strongest = next(group for group in page.groups if group.section == "Strongest")
    assert len(strongest.contexts) == min(20, int(on.sum()))
    for rank, context in enumerate(strongest.contexts):
        texts, scores, own = best.context(2, rank)
        assert list(context.tokens) == texts and context.mark == own
        np.testing.assert_array_equal(context.values, np.array(scores, dtype=np.float32))
    words = page.contexts(k=3)
    assert all(line[mark] == "w7" for line, mark in zip(words.lines, words.marks, strict=True) if mark is not None)


def test_padding_after_a_context_is_not_shown() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(2, 12)
    tokens[1, 6:] = 1  # <pad>
    rows = token_rows(bridge, tokens, STREAM, skip_tokens=[0, 1])
    acts = torch.where((rows.row == 1) & (rows.position == 4), 2.0, 0.5 * (rows.row == 0))[:, None]
    first = dashboard(bridge, rows, acts).show(0).contexts(k=1)
    assert list(first.lines[0]) == ["<bos>", *(f"w{i}" for i in tokens[1, 1:6].tolist())] and first.marks[0] == 4
    assert np.isnan(first.values[0][0]) and first.values[0][1:].tolist() == [0, 0, 0, 2, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_of_features_are_those_of_output_tokens(family: str) -> None:
    bridge = tiny_bridge(family)
    rows = token_rows(bridge, tiny_tokens(3, 8), hook_name("neuron", LAST))
    components = noise(4, D_MLP)
    found = dashboard(bridge, rows, torch.rand(len(rows), 4), directions=components, n_tokens=7).show(1).effects
    assert found is not None
    wanted = output_tokens(bridge, LAST, components, k=7).to_dataframe().query("feature == 1")
    for side in ("promoted", "suppressed"):
        part = wanted[wanted["side"] == side]
        assert [token for token, _, _ in found[side]] == part["token"].tolist()
        np.testing.assert_allclose([value for _, value, _ in found[side]], part["value"], atol=1e-5)
        np.testing.assert_allclose([spreads for _, _, spreads in found[side]], part["spreads"], rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_in_the_stream_are_how_logits_move(family: str) -> None:
    """A vector added to the last stream, against the unembedding behind the final norm at a fixed scale."""
    bridge = tiny_bridge(family)
    rows = token_rows(bridge, tiny_tokens(3, 8), STREAM)
    directions = noise(3, D_MODEL)
    found = dashboard(bridge, rows, torch.rand(len(rows), 3), directions=directions, n_tokens=D_VOCAB).show(2).effects
    assert found is not None
    unit = (directions[2] / directions[2].norm()).double()
    norm = bridge.ln_final
    centred = unit if norm.uses_rms_norm else unit - unit.mean()
    gain = norm.original_component.weight.detach().double()
    effects = (centred * (1 + gain if family == "gemma2" else gain)) @ bridge.W_U.detach().double()
    effects = effects - effects.mean()
    np.testing.assert_allclose(
        [value for _, value, _ in found["promoted"]], effects.sort(descending=True).values, atol=1e-5
    )


def test_effects_of_heads_go_through_w_o_and_other_hooks_are_refused() -> None:
    bridge, rows = tiny_bridge("llama"), stream_rows(documents=2, length=6)
    acts = torch.rand(len(rows), 3)
    weight = bridge.blocks[1].attn.W_O.detach().reshape(-1, D_MODEL)
    directions = noise(3, len(weight))
    through = directions / directions.norm(dim=1, keepdim=True) @ weight
    page = dashboard(bridge, rows, acts, directions=directions, hook="blocks.1.attn.hook_z").show(0)
    scale = float(through[0].norm())
    plain = dashboard(bridge, rows, acts, directions=through).show(0)
    assert page.effects is not None and plain.effects is not None
    for (token, value, _), (other, effect, _) in zip(page.effects["promoted"], plain.effects["promoted"], strict=True):
        assert token == other and value == pytest.approx(scale * effect, rel=1e-4)
    with pytest.raises(ValueError, match=r"blocks.1.attn.hook_q.*effects=False"):
        dashboard(bridge, rows, acts, directions=noise(3, 32), hook="blocks.1.attn.hook_q")
    quiet = dashboard(bridge, rows, acts, directions=noise(3, 32), hook="blocks.1.attn.hook_q", effects=False).show(0)
    assert quiet.effects is None and "Not known" in quiet.html() and len(quiet.table("Nearest")) == 2
    with pytest.raises(ValueError, match=r"directions are \(3, 5\).*expected \[unit, 32\]"):
        dashboard(bridge, rows, acts, directions=noise(3, 5))
    gemma = tiny_bridge("gemma2")
    with pytest.raises(ValueError, match="norm after attention"):
        dashboard(gemma, rows, acts, directions=directions, hook="blocks.1.attn.hook_z")


def test_random_directions_are_what_random_directions_do() -> None:
    """A dashboard of random directions has largest effects as its own null says."""
    rows, bridge = stream_rows(documents=2, length=6), tiny_bridge("llama")
    directions = noise(400, D_MODEL, seed=9)
    found = dashboard(bridge, rows, torch.rand(len(rows), 400), directions=directions)
    peaks = found.to_dataframe()["spreads"]
    median, high = found._pages.effects.random  # type: ignore[union-attr]
    assert np.median(peaks) == pytest.approx(median, abs=0.1)
    assert 0.02 < (peaks > high).mean() < 0.09


def labelled_rows(n_labels: int = 3) -> tuple[TokenRows, torch.Tensor, dict[str, torch.Tensor]]:
    rows = stream_rows(documents=24)
    labels = {f"kind={i}": noise(len(rows), seed=10 + i) > 0.8 for i in range(n_labels)}
    acts = sparse_activations(len(rows), 5)
    acts[:, 1] += labels["kind=1"] * (1 + noise(len(rows), seed=20).abs())
    acts[:, 2] = noise(len(rows), seed=21) - labels["kind=2"].float()  # dense, and below on the label
    return rows, acts, labels


def test_label_scores_are_those_of_label_features() -> None:
    rows, acts, labels = labelled_rows()
    frame = label_features(acts, labels, rows.row)
    board = dashboard(tiny_bridge("llama"), rows, acts, labels=labels)
    index = board.to_dataframe()
    for unit in range(4):
        assert index["label"][unit] == frame["label"][unit]
        assert index["auroc"][unit] == pytest.approx(frame["auroc"][unit], abs=1e-12)
    assert pd.isna(index["label"][4]) and np.isnan(index["auroc"][4])  # dead
    assert index["label"][1] == "kind=1"
    half = torch.unique(rows.row, return_inverse=True)[1] % 2 == 1
    wanted = auroc(acts[half], torch.stack(list(labels.values()), 1)[half])
    for unit in range(4):
        table = board.show(unit).table("Labels").set_index("label")["AUROC"]
        np.testing.assert_allclose(table[list(labels)], wanted[:, unit], atol=1e-12)
    precise = board.show(1).table("Labels").iloc[0]
    fires, truth = acts[half, 1] > 0, labels["kind=1"][half]
    assert precise["precision"] == pytest.approx(float(truth[fires].double().mean()))
    assert precise["recall"] == pytest.approx(float(fires[truth].double().mean()))


def test_label_intervals_are_as_wide_as_resampling_documents_makes_them() -> None:
    rows, acts, labels = labelled_rows()
    scores, (low, high) = LabelScores(rows, labels, 0.95), (0.025, 0.975)
    order = torch.unique(rows.row, return_inverse=True)[1]
    half = order % 2 == 1
    draws = _document_draws(order[half], 4000, 0)
    columns = Columns.of(rows.values, acts, threshold=0.0, batch_size=64)
    for unit in (0, 1, 2):
        found = scores.of(*columns.entries(unit), 0.0)
        for i, mask in enumerate(labels.values()):
            drawn = _weighted_auroc(acts[half, unit].double().numpy(), mask[half].numpy(), draws)
            wanted = np.quantile(drawn, high) - np.quantile(drawn, low)
            assert found["high"][i] - found["low"][i] == pytest.approx(wanted, rel=0.25)  # 12 documents


def test_bands_hold_their_activations_and_facets_are_a_partition() -> None:
    rows = stream_rows()
    values = np.random.default_rng(0).uniform(0.01, 4, len(rows)).astype(np.float32)
    values[17] = 4
    found = bands(Places(rows, (4, 2)), np.arange(len(rows)), values, n_bands=4, n=5, seed=0)
    assert [round(high) for _, high, _, _ in found] == [4, 3, 2, 1] and sum(n for *_, n, _ in found) == len(rows)
    for low, high, n, drawn in found:
        assert n == ((values > low) & (values <= high)).sum() and len(drawn) == len(set(drawn)) == 5
        assert all(low < values[row] <= high for row in drawn)
        assert values[drawn].tolist() == sorted(values[drawn].tolist(), reverse=True)

    truth = np.zeros((100, 3), dtype=bool)
    truth[:20, 0], truth[:40, 1], truth[50:, 2] = True, True, True
    chosen = [*range(10), *range(25, 32), 45, 46]
    parts = label_facets(truth, ["a", "b", "c"], chosen)
    # 17 of 19 have b, 10 have a: b adds 17 log(.89/.4) = 13.6, a adds 10 log(.53/.2) = 9.7
    assert [(name, len(mine)) for name, _, mine in parts] == [("b", 17), ("", 2)]
    assert sorted(row for _, _, mine in parts for row in mine) == chosen
    assert [name for name, *_ in label_facets(truth, ["a", "b", "c"], list(range(15)))] == ["a"]


def test_clusters_find_two_kinds_of_activations_and_not_one() -> None:
    values = noise(60, 16, seed=4)
    values[:, 0] += 12  # on the sphere: one cloud round one pole
    assert len(cluster_facets(values, range(60), seed=0)[0]) == 1
    values[:20, 0] -= 12
    values[:20, 1] += 12
    parts, p = cluster_facets(values, range(60), seed=0)
    assert [sorted(mine) for _, _, mine in parts] == [list(range(20, 60)), list(range(20))] and p < 0.05


def test_a_division_that_any_tokens_have_is_shown_beside_that_of_random_ones() -> None:
    rows, bridge = stream_rows(), tiny_bridge("llama")
    values = noise(len(rows), 16, seed=4)
    values[::2, 0] += 12  # every second token lies elsewhere, whatever the unit does
    values[1::2, 1] += 12
    acts = noise(len(rows), 2, seed=5).abs()
    board = dashboard(bridge, dataclasses.replace(rows, values=values), acts, facets="cluster", kind="latent")
    notes = [group.note for group in board.show(0).groups if group.section.startswith("Facets")]
    assert len(notes) == 2 and all(re.search(r"at random: 2 found, p 0\.0", note) for note in notes)


def test_a_negative_side_is_shown_and_a_dead_unit_says_so() -> None:
    rows, bridge = stream_rows(), tiny_bridge("llama")
    acts = noise(len(rows), 4, seed=6)
    acts[:, 1] = -acts[:, 1].abs() - 0.1
    acts[:, 2] = 0
    acts[3, 0] = -50
    board = dashboard(bridge, rows, acts, kind="latent")
    page = board.show(0)
    assert page.signed and page.edges[0] == -50 and "negative side" in page.warning
    negative = page.contexts("Most negative", k=1)
    assert negative.values[0][negative.marks[0]] == -50
    assert "never positive" in board.show(1).warning
    dead = board.show("latent 2")
    assert "Dead" in dead.warning and "Dead" in dead.html() and not dead.groups and not dead.counts.any()
    with pytest.raises(KeyError, match="no contexts 'Strongest' of latent 2"):
        dead.contexts()
    assert board.to_dataframe()["density"][2] == 0


def test_of_dictionary_snmf_and_neurons() -> None:
    bridge, rows = tiny_bridge("gpt2"), stream_rows("gpt2")
    sae = TopKSAE(D_MODEL, 24, k=3, hook=STREAM)
    board = Dashboard.of_dictionary(bridge, sae, rows, batch_size=50)
    latents = sae.encode(rows.values)
    assert board.to_dataframe()["density"].tolist() == pytest.approx((latents > 0).float().mean(0).tolist())
    assert "24 latents" in repr(board) and board.provenance["source"]["architecture"] == "topk"
    with pytest.raises(ValueError, match=r"reads .*resid_post.* rows are of .*resid_pre"):
        Dashboard.of_dictionary(bridge, sae, token_rows(bridge, rows.tokens, hook_name("resid_pre", 1)))

    post = token_rows(bridge, rows.tokens, hook_name("neuron", 1), skip_tokens=[0])
    neurons = Dashboard.of_neurons(bridge, post)
    best = neurons.show("L1N17").contexts(k=1)
    assert best.values[0][best.marks[0]] == post.values[:, 17].max()
    assert neurons.to_dataframe()["largest"].tolist() == pytest.approx(post.values.amax(0).tolist())
    with pytest.raises(ValueError, match="expected those of a layer's neurons"):
        Dashboard.of_neurons(bridge, rows)

    snmf = SNMF(4, sparsity=0.1, max_iter=5).fit(post.values)
    features = Dashboard.of_snmf(bridge, snmf, post).to_dataframe()
    acts = snmf.transform(post.values)
    firing = (acts > 0.1 * acts.amax(0)) & (acts > 0)  # as FeatureReading.frequency
    assert features["density"].tolist() == pytest.approx(firing.float().mean(0).tolist())
    wanted = output_tokens(bridge, 1, snmf.components_, k=5)
    assert features["promotes"][2] == wanted.words(2, "promoted", 5)


EVIL = "</script><script>alert(1)</script>{{body}}&\"'"


def evil_page() -> LatentPage:
    context = Context((EVIL, "a"), np.array([1.0, np.nan], dtype=np.float32), 0, EVIL)
    return LatentPage(
        number=3, name=EVIL, subtitle=EVIL, facts=((EVIL, EVIL),), warning=EVIL, edges=np.linspace(0, 1, 3),
        counts=np.array([1, 2]), off=0.5, groups=(ContextGroup(EVIL, EVIL, EVIL, (context,)),),
        effects={"promoted": [(EVIL, 1.0, 2.0)], "suppressed": [(EVIL, -1.0, -2.0)]}, effects_note=EVIL, tables=(),
        provenance=((EVIL, EVIL),), signed=False, glue=" ",
    )  # fmt: skip


def test_tokens_are_escaped_and_nothing_is_fetched() -> None:
    page = evil_page().html(index="../index.html")
    assert "<script" not in page.replace(EVIL, "") and EVIL not in page and page.count("&lt;script&gt;") > 8
    frame = pd.DataFrame({"unit": [0], "density": [0.5], "words": [[EVIL, "<b>"]], "label": [EVIL]})
    columns = tuple(
        Column(key, key, kind, EVIL)  # type: ignore[arg-type]
        for key, kind in (("unit", "number"), ("density", "number"), ("words", "words"), ("label", "label"))
    )
    index = LatentIndex(EVIL, ((EVIL, EVIL),), columns, frame, ("unit", False), ())
    text = index.html()
    assert text.count("<script") == 2 and text.count("</script>") == 2 and EVIL not in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert data["words"] == [EVIL.replace(" ", "␣"), "<b>"] and data["labels"] == [EVIL]
    for some in (page, text, index._repr_html_(), evil_page()._repr_html_()):
        assert "http" not in some and "src=" not in some and "@import" not in some and "url(" not in some


def board_of(n_units: int = 12) -> Dashboard:
    rows = stream_rows(documents=6, length=10)
    return dashboard(tiny_bridge("llama"), rows, sparse_activations(len(rows), n_units), kind="latent")


def test_saving_resumes_and_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, folder = board_of(), tmp_path / "board"
    real = Path.replace

    def killed(self: Path, target: Any) -> Path:
        if Path(target).name == "02.html":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        board.save(folder)
    monkeypatch.setattr(Path, "replace", real)
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert there == ["dashboard.json", "index.html", "latents/00.html", "latents/01.html"]
    (folder / "latents" / "01.html").write_text("mine")
    index = board.save(folder, [0, 1, "latent 2"])
    assert (folder / "latents" / "01.html").read_text() == "mine"
    text = index.read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert data["pages"] == [0, 1, 2] and data["n"] == 12 and data["width"] == 2
    page = (folder / "latents" / "02.html").read_text()
    assert page.rstrip().endswith("</html>") and "../index.html#q=unit%3D" in page
    record = provenance(tiny_bridge("llama"))
    for said in (STREAM, record["model"], record["revision"], f"{board.n_tokens} of 6 documents"):
        assert str(said) in page
    board.save(folder, [1], overwrite=True)
    assert (folder / "latents" / "01.html").read_text() != "mine"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    board = board_of()
    folder = board.save(tmp_path / "a", [0]).parent
    with pytest.raises(ValueError, match=r"holds a dashboard of .*resid_post.*overwrite=True"):
        board_of(11).save(folder, [1])
    board_of(11).save(folder, [1], overwrite=True)
    assert sorted(path.name for path in (folder / "latents").iterdir()) == ["01.html"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no dashboard"):
        board.save(tmp_path / "b")
    (folder / "dashboard.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        board.save(folder)


def test_what_does_not_fit_is_refused() -> None:
    rows, bridge = stream_rows(documents=3, length=6), tiny_bridge("llama")
    acts = torch.rand(len(rows), 3)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: dashboard(bridge, rows, acts[:-1]), "activations have 14 rows and there are 15 tokens"),
        (lambda: dashboard(bridge, rows, lambda x: x[:-1]), "expected \\[token, unit\\]"),
        (lambda: dashboard(bridge, rows, acts / 0), "the activation of unit 0 on row 0 is inf"),
        (lambda: dashboard(bridge, rows, acts, names=["a"]), "1 names for 3 units"),
        (lambda: dashboard(bridge, rows, acts, directions=noise(2, D_MODEL)), "2 directions for 3 units"),
        (lambda: dashboard(bridge, rows, acts, threshold=1), "threshold=1"),
        (lambda: dashboard(bridge, rows, acts, facets="label"), "needs labels"),
        (lambda: dashboard(bridge, rows, acts, n_contexts=0), "n_contexts=0"),
        (lambda: dashboard(bridge, rows, acts, window=(-1, 3)), "window=\\(-1, 3\\)"),
        (lambda: dashboard(bridge, rows, acts, labels={"a": rows.ids > 30}), "of 3 documents.*at least 4"),
        (lambda: dashboard(bridge, rows, acts).show(3), "no unit 3; there are 3"),
        (lambda: dashboard(bridge, rows, acts).show("x"), "no unit is called 'x'"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, KeyError), match=message):
            call()


@functools.cache
def big_index(n: int = 10_000) -> LatentIndex:
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(3_000)])
    frame = pd.DataFrame({
        "unit": np.arange(n), "density": rng.integers(100, size=n) / 1000, "largest": rng.gamma(2, 2, n),
        "histogram": list(rng.poisson(3, (n, 16))), "fires_on": words[rng.integers(3_000, size=(n, 5))].tolist(),
        "promotes": words[rng.integers(3_000, size=(n, 5))].tolist(),
        "suppresses": words[rng.integers(3_000, size=(n, 5))].tolist(),
        "label": rng.choice(["topic=sea", "role=noun"], n),
        "auroc": np.where(rng.random(n) < 0.1, np.nan, rng.integers(500, 1000, size=n) / 1000),
    })  # fmt: skip
    frame["fires_on"] = [[*row, "needle"] if unit % 20 == 7 else row for unit, row in enumerate(frame["fires_on"])]
    kinds = {"histogram": "bars", "label": "label"} | dict.fromkeys(["fires_on", "promotes", "suppresses"], "words")
    columns = tuple(Column(key, key, kinds.get(key, "number"), "") for key in frame)  # type: ignore[arg-type]
    return LatentIndex("10,000 latents", (), columns, frame, ("unit", False), ())


def test_index_of_ten_thousand_is_small_and_whole() -> None:
    text = big_index().html(pages=[3])
    assert len(text.encode()) < 5e6
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert data["n"] == 10_000 and all(len(column) == 10_000 for column in data["values"].values())
    assert data["values"]["unit"] == list(range(10_000)) and None in data["values"]["auroc"]
    assert all(len(bars) == 16 for bars in data["values"]["histogram"])


def test_index_of_ten_thousand_in_a_browser(tmp_path: Path) -> None:
    """The page measures its own time to the first table; a fragment of the address drives the search."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no browser found: install Chrome or Chromium, or set BROWSER_PATH")
    path, index = tmp_path / "index.html", big_index()
    index.save_html(path, pages=range(10_000))

    def dom(fragment: str = "") -> tuple[dict[str, float], list[int], str]:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            + ["--dump-dom", path.as_uri() + fragment],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found = dict(re.findall(r'data-(\w+)="([\d.]+)"', done.stdout.split(">", 2)[1]))
        assert found, done.stderr[-500:]
        numbers = {name: float(value) for name, value in found.items()}
        return numbers, [int(unit) for unit in re.findall(r'data-unit="(\d+)"', done.stdout)], done.stdout

    first, units, _ = dom()
    assert first["matches"] == 10_000 and units == list(range(100))
    assert first["ready"] < 1000, first  # milliseconds
    found, units, text = dom("#q=Needle+density%3E0.02+topic&sort=auroc&down=1&page=1")
    frame = index.frame
    chosen = frame[(frame["unit"] % 20 == 7) & (frame["density"] > 0.02) & (frame["label"] == "topic=sea")]
    order = chosen.sort_values("auroc", ascending=False, kind="stable", na_position="last")["unit"].tolist()
    assert found["matches"] == len(order) and len(order) > 150 and units == order[100:200]
    assert re.findall(r'href="(.*?)"', text) == [f"latents/{unit:04d}.html" for unit in units]
