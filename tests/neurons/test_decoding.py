"""Decoding of whole models, against scores written out over the whole vocabulary, planted neurons and random ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.models import geometry
from interp.neurons import NeuronAtlas, decode, decoding
from interp.neurons._readout import SCORES, Readout, Score
from interp.neurons._sides import SIDES, Side, side_vectors, unembedding
from tests.helpers import D_MLP, D_MODEL, D_VOCAB, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge

K = 4


def sides_of(family: str) -> list[Side]:
    return [side for side in SIDES if side != "gate" or geometry(tiny_bridge(family)).gated]


def all_scores(bridge: Any, side: Side, layer: int, score: Score, *, fold: bool, scale: float) -> Tensor:
    """Every neuron against every token, from the definitions, in float64."""
    v, u = side_vectors(bridge, layer, side, fold=fold).double(), unembedding(bridge, fold=fold).double()
    if score == "centred_cosine":
        u = u - u.mean(1, keepdim=True)
    plain = torch.einsum("nd,dt->nt", v, u)
    if score == "dot":
        return plain
    per_length = plain / v.norm(dim=1)[:, None]
    if score in ("cosine", "centred_cosine"):
        return per_length / u.norm(dim=0)
    if score == "unit":
        return per_length
    return scale * per_length if score == "logit" else (scale * per_length).softmax(1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_the_whole_product(family: str, score: Score) -> None:
    bridge, sides = tiny_bridge(family), sides_of(family)
    fold = score != "unit"
    atlas = decode(bridge, weights=None, top_k=K, score=score, fold=fold, null=None, memory_budget=80_000)
    assert atlas.sides == sides
    for place, side in enumerate(sides):
        for layer in range(N_LAYERS):
            expected = all_scores(bridge, side, layer, score, fold=fold, scale=math.sqrt(D_MODEL))
            cell = {"side": place, "layer": layer}
            for sign, values, ids in (
                (1, atlas.top_values, atlas.top_ids),
                (-1, atlas.bottom_values, atlas.bottom_ids),
            ):
                best = (sign * expected).topk(K)
                found = torch.from_numpy(values[cell].values)
                torch.testing.assert_close(found, (sign * best.values).float(), atol=1e-5, rtol=1e-4)
                assert np.array_equal(ids[cell].values, best.indices.int().numpy())
            size = expected.abs().max(1)
            peak = expected.gather(1, size.indices[:, None])[:, 0]
            close(atlas.values[cell], peak)
            assert np.array_equal(atlas.label_ids[cell].values, size.indices.numpy())
            spread = all_scores(bridge, side, layer, "logit", fold=fold, scale=math.sqrt(D_MODEL))
            of = spread if score == "prob" else expected
            close(atlas.mean[cell], of.mean(1))
            close(atlas.std[cell], of.std(1, unbiased=False))
            close(atlas.norm[cell], side_vectors(bridge, layer, side, fold=fold).norm(dim=1))
            if score in ("logit", "prob"):
                close(atlas.logsumexp[cell], spread.logsumexp(1))
            else:
                assert np.isnan(atlas.logsumexp[cell]).all()


def close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found.values), expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score", ["logit", "prob"])
def test_the_scale_is_the_length_of_the_vector(score: Score) -> None:
    bridge = tiny_bridge("llama")
    atlas = decode(bridge, score=score, scale=2, layers=[1], null=None, top_k=3)
    expected = all_scores(bridge, "out", 1, score, fold=True, scale=2.0)
    close(atlas.top_values[0, 1], expected.topk(3).values)
    assert atlas.provenance["scale"] == 2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_the_budget_nor_keeping_the_unembedding_changes_a_number(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [decode(tiny_bridge(family), memory_budget=budget) for budget in (90_000, 2**28)]
    half = [decode(tiny_bridge(family), dtype="bfloat16", null=None)]
    kept: list[int] = []

    def forgetful(*args: Any, **options: Any) -> Readout:
        readout = Readout(*args, **{**options, "room": 16 * D_MODEL * 7})
        kept.append(readout.kept)
        return readout

    monkeypatch.setattr(decoding, "Readout", forgetful)
    found.append(decode(tiny_bridge(family)))
    half.append(decode(tiny_bridge(family), dtype="bfloat16", null=None))
    assert kept == [0, 0] and np.array_equal(half[0].top_values, half[1].top_values)
    for name in ("top_ids", "bottom_ids", "top_values", "values", "null_peaks", "std"):
        arrays = [getattr(atlas, name).values for atlas in found]
        assert all(np.allclose(array, arrays[0], atol=2e-6) for array in arrays), name
    with pytest.raises(ValueError, match="memory_budget of"):
        decode(tiny_bridge(family), memory_budget=10_000)


def test_equal_scores_go_to_the_lower_id() -> None:
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        bridge.original_model.lm_head.weight[30:] = bridge.original_model.lm_head.weight[:30].clone()
    atlas = decode(bridge, null=None, top_k=6)
    ids, values = atlas.top_ids.values, atlas.top_values.values
    assert (ids[..., ::2] + 30 == ids[..., 1::2]).all() and (values[..., ::2] == values[..., 1::2]).all()
    assert (atlas.label_ids.values < 30).all()


def test_bfloat16_rounds_the_operands_and_nothing_else() -> None:
    bridge = tiny_bridge("gpt2")
    for asked in ("bfloat16", torch.bfloat16):
        atlas = decode(bridge, dtype=asked, null=None, layers=[0], top_k=3)
        v = torch.nn.functional.normalize(side_vectors(bridge, 0, "out"), dim=1).bfloat16().double()
        u = unembedding(bridge)
        u = torch.nn.functional.normalize(u - u.mean(1, keepdim=True), dim=0).bfloat16().double()
        torch.testing.assert_close(torch.from_numpy(atlas.top_values.values[0, 0]), (v @ u).topk(3).values.float())
        assert atlas.provenance["operands"] == "bfloat16"
    assert not np.array_equal(atlas.values.values, decode(bridge, null=None, layers=[0]).values.values, equal_nan=True)


def test_half_precision_models_are_decoded_from_their_weights() -> None:
    bridge = tiny_bridge("gemma2", dtype=torch.bfloat16)
    expected = all_scores(bridge, "gate", 2, "cosine", fold=True, scale=1.0)
    close(decode(bridge, weights="gate", score="cosine", null=None).top_values[0, 2], expected.topk(10).values)


# What stands out


def plant(bridge: Any, layer: int, neuron: int, side: Side, token: int, sign: int = 1) -> None:
    """Make the neuron's folded vector the direction of a token, 2 long."""
    block = bridge.blocks[layer]
    direction = unembedding(bridge)[:, token] - unembedding(bridge).mean(1)
    gain = torch.ones(D_MODEL)
    norm = block._modules.get("ln2_post") if side == "out" else block.ln2
    if norm is not None:
        gain = norm._original_component.weight + (1 if "gemma" in bridge.cfg.model_name else 0)
    vector = sign * 2 * direction / direction.norm() / gain
    with torch.no_grad():
        (block.mlp.W_out[neuron] if side == "out" else getattr(block.mlp, f"W_{side}")[:, neuron]).copy_(vector)


@pytest.mark.parametrize("null", get_args(decoding.Null))
def test_planted_neurons_are_found_and_hardly_any_others(null: Any) -> None:
    n_planted, n_found = 0, 0
    for family in FAMILIES:
        bridge, planted = fresh_bridge(family), {}
        for side in sides_of(family):
            for layer, neuron, token, sign in ((0, 3, 17, 1), (1, 40, 50, 1), (2, 40, 9, -1), (2, 5, 17, 1)):
                plant(bridge, layer, neuron, side, token, sign)
                planted[side, layer, neuron] = (token, sign)
        atlas = decode(bridge, weights=None, null=null)
        strict: Any = atlas.specialised(
            q=0.001 if null == "rotation" else 0.04
        )  # its covariance has the planted ones in it
        assert {(r.side, r.layer, r.neuron): (r.id, r.sign) for r in strict.itertuples()} == planted, family
        assert (np.abs(strict["value"].to_numpy()) > 0.999).all()
        assert (strict["token"] == [f"w{i}" for i in strict["id"]]).all() and (np.diff(strict["z"]) <= 0).all()
        found = len(atlas.specialised(q=0.05))
        allowed = 1 if family == "gemma2" else 0  # of so many finds the bound allows one in twenty to be false
        assert len(planted) <= found <= len(planted) + allowed, family
        n_planted, n_found = n_planted + len(planted), n_found + found
    assert n_planted / n_found >= 0.95


@pytest.mark.parametrize("null", get_args(decoding.Null))
def test_random_models_have_no_specialised_neurons_and_even_p(null: Any) -> None:
    atlases = [decode(tiny_bridge(family), weights=["in", "out"], null=null) for family in FAMILIES]
    assert np.mean([atlas.q.values <= 0.05 for atlas in atlases]) <= 0.005
    p = np.concatenate([atlas.p.values.reshape(-1) for atlas in atlases])
    shares = {level: float((p <= level).mean()) for level in (0.5, 0.2, 0.05)}
    for level, share in shares.items():
        assert abs(share - level) < 0.3 * level, shares


@pytest.mark.parametrize("score", ["dot", "prob", "logit"])
def test_a_null_peak_is_on_the_scale_of_the_peaks(score: Score) -> None:
    """Random models: z and p as for cosines, however much longer some neurons are than others."""
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.W_out[:10] *= 50
    atlas = decode(bridge, score=score)
    assert abs(float(atlas.z.mean())) < 0.3 and 0.7 < float(atlas.z.std()) < 1.3
    assert float(atlas.q.min()) > 0.05
    assert atlas.null_peaks is not None and atlas.null_peaks.shape[-1] * N_LAYERS >= 1000
    assert decode(bridge, score=score, null="covariance", layers=[0]).null_peaks.shape[-1] >= 1000  # pyright: ignore


def test_probabilities_are_judged_by_their_largest_logit() -> None:
    """A neuron whose only sharp score is its smallest is no finding where only the largest is a label."""
    bridge = fresh_bridge("llama")
    plant(bridge, 1, 7, "out", 12, -1)
    assert decode(bridge, score="logit").specialised().iloc[0][["layer", "neuron", "sign"]].tolist() == [1, 7, -1]
    atlas = decode(bridge, score="prob")
    assert float(atlas.z[0, 1, 7]) < 2 and (atlas.values.values > 0).all()


def test_the_null_keeps_what_the_model_keeps() -> None:
    vectors = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    for centred in (False, True):
        given = vectors - vectors.mean(1, keepdim=True) if centred else vectors
        turned = decoding._null_vectors(given, "rotation", centred, seed=1)
        torch.testing.assert_close(turned @ turned.T, given @ given.T, atol=1e-4, rtol=1e-4)
        assert (float(turned.sum(1).abs().max()) < 1e-4) == centred
        assert float((turned - given).norm() / given.norm()) > 1
    assert len({decoding._seed(0, side, layer, draw) for side in SIDES for layer in (0, 1) for draw in (0, 1)}) == 12


def test_seeds_make_the_null_and_nothing_else() -> None:
    a, again, b = (decode(tiny_bridge("gpt2"), seed=seed) for seed in (0, 0, 1))
    assert a.null_peaks is not None
    assert np.array_equal(a.z, again.z) and not np.array_equal(a.z, b.z) and np.array_equal(a.values, b.values)
    peaks = a.null_peaks.values[0]
    assert len(np.unique(peaks)) == peaks.size  # each layer and draw has its own


def test_without_a_null_nothing_is_said_about_chance() -> None:
    atlas = decode(tiny_bridge("gpt2"), null=None)
    assert atlas.null_peaks is None and np.isnan(atlas.z).all() and np.isnan(atlas.p).all() and np.isnan(atlas.q).all()
    with pytest.raises(ValueError, match=r"no null to stand out against; decode\(\.\.\., null='rotation'\)"):
        atlas.specialised()


# What is left out, and what is refused


def test_layers_that_are_not_decoded_are_missing() -> None:
    bridge = tiny_bridge("llama")
    part, whole = decode(bridge, layers=[2, 1]), decode(bridge)
    assert (
        np.isnan(part.values[:, 0]).all() and (part.top_ids[:, 0] == -1).all() and (part.bottom_ids[:, 0] == -1).all()
    )
    assert part.provenance["layers"] == [1, 2] and np.isnan(part.q[:, 0]).all() and np.isfinite(part.q[:, 1:]).all()
    assert np.array_equal(part.top_ids[:, 1:], whole.top_ids[:, 1:])
    assert set(part.labels()["layer"]) == {1, 2}


def test_neurons_and_tokens_without_a_direction() -> None:
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        bridge.blocks[1].mlp.W_out[4] = 0
        bridge.blocks[1].mlp.W_out[5] *= 1e-3  # short, but a direction
        bridge.original_model.lm_head.weight[20] = 0
    for score in ("cosine", "dot"):
        atlas = decode(bridge, score=score, top_k=D_VOCAB)
        assert np.isnan(atlas.values[0, 1, 4]) and (atlas.top_ids[0, 1, 4] == -1).all() and np.isnan(atlas.q[0, 1, 4])
        assert np.isfinite(atlas.values.values).sum() == N_LAYERS * D_MLP - 1
        assert int(atlas.label_counts.sum()) == N_LAYERS * D_MLP - 1
        assert atlas.null_peaks is not None
        drawn = atlas.null_peaks.values[0].reshape(N_LAYERS, -1, D_MLP)  # as many draws of each neuron
        assert np.isnan(drawn[1, :, 4]).all() and np.isnan(drawn).sum() == drawn.shape[1]
        place = np.nonzero(atlas.top_ids.values[0, 0, 0] == 20)[0][0]
        assert atlas.top_values.values[0, 0, 0, place] == 0  # the token without a direction is at right angles to all
    assert decode(bridge, layers=[1]).neuron(1, 4)["token"].eq("").all()


def test_nan_is_refused() -> None:
    bridge = fresh_bridge("llama")
    decode(bridge, weights="gate")  # so that the model was seen to be built as it should be
    with torch.no_grad():
        bridge.blocks[2].mlp.W_gate[3, 11] = torch.nan
    decode(bridge, weights="gate", layers=[0, 1])
    with pytest.raises(ValueError, match=r"'gate' of layer 2 has NaN or infinite weights in 1 of 48 neurons .*is 11\)"):
        decode(bridge, weights="gate", layers=[2])
    with torch.no_grad():
        bridge.original_model.lm_head.weight[41, 0] = torch.inf
    with pytest.raises(ValueError, match=f"NaN or infinite values in the columns of 1 of {D_VOCAB} tokens"):
        decode(bridge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "gate"}, "has no gate"),
        ({"weights": []}, "name each side once"),
        ({"weights": ["in", "in"]}, "name each side once"),
        ({"layers": []}, "expected different layers from 0 to 2"),
        ({"layers": [0, 0]}, r"layers=\[0, 0\]"),
        ({"layers": [3]}, "from 0 to 2"),
        ({"top_k": 0}, "expected 1 to the 60 tokens"),
        ({"top_k": 61}, "top_k=61"),
        ({"scale": 3.0}, "scale=3.0 has no part in score='centred_cosine'"),
        ({"scale": 0.0, "score": "prob"}, "expected a positive number"),
        ({"scale": math.inf, "score": "logit"}, "expected a positive number"),
        ({"dtype": torch.float16}, "operands are float32 or bfloat16"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(tiny_bridge("gpt2"), **options)


@pytest.mark.parametrize("options", [{"score": "cos"}, {"null": "shuffle"}, {"weights": "up"}])
def test_unknown_words_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(tiny_bridge("gpt2"), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str) -> None:
    bridge, calls = fresh_bridge(family), []
    bridge.add_hook("blocks.0.mlp.hook_post", lambda tensor, hook: calls.append(0) or tensor * 0)
    before = {name: tensor.clone() for name, tensor in bridge.original_model.state_dict().items()}
    with torch.enable_grad():
        atlas = decode(bridge, weights=None)
        assert torch.is_grad_enabled()
    assert calls == [] and np.array_equal(atlas.values, decode(tiny_bridge(family), weights=None).values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bridge.original_model.state_dict().items())


# On disk


def test_on_disk_it_is_the_same_and_mapped(tmp_path: Path) -> None:
    bridge = tiny_bridge("llama")
    stored, held = decode(bridge, weights=None, path=tmp_path / "a"), decode(bridge, weights=None)
    assert_same(stored, held)
    assert stored.token_strings == held.token_strings and stored.provenance == held.provenance
    for name in ("top_ids", "values", "null_peaks"):
        assert is_mapped(getattr(stored, name).values) and not is_mapped(getattr(held, name).values)
        with pytest.raises(ValueError, match="read-only"):
            getattr(stored, name).values[...] = 0
    assert stored.writes("w9").equals(held.writes("w9")) and is_mapped(stored._index["entries"])
    assert {file.suffix for file in (tmp_path / "a").iterdir()} == {".npy", ".json"}


def is_mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base  # pyright: ignore[reportAssignmentType]
    return array is not None


def assert_same(a: NeuronAtlas, b: NeuronAtlas) -> None:
    names = "values top_values top_ids bottom_values bottom_ids mean std logsumexp norm z p q label_counts null_peaks"
    for name in names.split():
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Calls of the search, which is killed at one of them."""
    calls: list[int] = []
    real = decoding.scan

    def scan(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(decoding, "scan", scan)
    return calls


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, path = tiny_bridge("llama"), tmp_path / "atlas"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at=5)
        decode(bridge, weights=["in", "out"], path=path)
    with pytest.raises(ValueError, match=r"is not finished: 4 of 6 layers are there.*same arguments and path"):
        NeuronAtlas.load(path)
    (path / "null_peaks.npy").rename(path / "null_peaks.npy.123.tmp")  # killed while a file was being made
    (path / "null_peaks.npy.123.tmp").rename(path / "null_peaks.npy")
    with monkeypatch.context() as patch:
        calls = counted(patch)
        assert_same(decode(bridge, weights=["in", "out"], path=path), decode(bridge, weights=["in", "out"]))
        assert len(calls) == 2 + 6
    with monkeypatch.context() as patch:
        calls = counted(patch)
        assert_same(decode(bridge, weights=["in", "out"], path=path), NeuronAtlas.load(path))
        assert calls == []


def test_a_layer_counts_once_the_manifest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between a layer's numbers and the note of them: it is done again."""
    bridge, path = tiny_bridge("gpt2"), tmp_path / "atlas"
    real, notes = decoding.Arrays._note, []

    def note(self: Any, **more: Any) -> None:
        notes.append(more)
        if len(notes) == 3:
            raise KeyboardInterrupt
        real(self, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding.Arrays, "_note", note)
        decode(bridge, path=path)
    calls = counted(monkeypatch)
    assert_same(decode(bridge, path=path), decode(bridge))
    assert len(calls) == 2 + 3


def test_directories_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    bridge, path = tiny_bridge("gpt2"), tmp_path / "atlas"
    decode(bridge, path=path, layers=[0], top_k=3)
    with pytest.raises(ValueError, match="holds an atlas made otherwise .*top_k 3 there, 4 asked"):
        decode(bridge, path=path, layers=[0], top_k=4)
    with pytest.raises(ValueError, match="revision"):
        decode(tiny_bridge("gpt2", seed=1), path=path, layers=[0], top_k=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no manifest\.json of an atlas"):
        decode(bridge, path=tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"is not an atlas: it has no manifest\.json"):
        NeuronAtlas.load(tmp_path / "notes")
    for text, message in (("{", "is not readable JSON"), ('{"format": "else"}', "is not the manifest of an atlas")):
        (tmp_path / "notes" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            NeuronAtlas.load(tmp_path / "notes")
