"""Agreement by brute force, planted changes and births, and floors whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import D_MLP, D_VOCAB, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokenizer

from interp.neurons import _label_lists as lists
from interp.neurons._sides import side_vectors, unembedding
from interp.neurons.births import LabelBirths, label_births
from interp.neurons.comparing import PARTS, AtlasComparison, compare
from interp.neurons.decoding import decode
from interp.neurons.robustness import label_robustness

BUDGET = 2**24


def _nudge(bridge, matrix: str, scale: float, seed: int = 0, layer: int = 1) -> None:
    """Add Gaussian noise to a weight of one layer."""
    weight = getattr(bridge.blocks[layer].mlp, matrix)
    with torch.no_grad():
        weight += (
            scale
            * weight.norm()
            / weight.numel() ** 0.5
            * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        )


def _aimed_at_labels():
    """A model whose output vectors in layer 1 have lost half of what they had of their best token."""
    bridge = fresh_bridge("llama")
    head = unembedding(bridge, fold=False)
    head = torch.nn.functional.normalize(head - head.mean(1, keepdim=True), dim=0)
    weight = bridge.blocks[1].mlp.W_out
    best = head[:, (weight @ head).argmax(1)].T
    with torch.no_grad():
        weight.sub_(0.5 * (weight * best).sum(1, keepdim=True) * best)
    return bridge


def _labels(bridge, side: str, layer: int) -> torch.Tensor:
    """The best token by centred cosine, written out."""
    head = unembedding(bridge)
    head = head - head.mean(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(
        side_vectors(bridge, layer, side)[:, None], head.T[None], dim=-1
    ).argmax(1)


class TestAgreement:
    def test_by_brute_force(self):
        rng = np.random.default_rng(0)
        a, b = (np.stack([rng.permutation(12)[:5] for _ in range(40)]) for _ in range(2))
        found = lists.agreement(torch.tensor(a), torch.tensor(b)).numpy()
        for row in range(40):
            mine, theirs = a[row].tolist(), b[row].tolist()
            assert found[0, row] == (mine[0] == theirs[0])
            assert found[1, row] == pytest.approx(len({*mine} & {*theirs}) / len({*mine} | {*theirs}))
            p, shared = 0.9, [len({*mine[:d]} & {*theirs[:d]}) for d in range(1, 6)]
            rbo = shared[-1] / 5 * p**5 + (1 - p) / p * sum(x / d * p**d for d, x in enumerate(shared, 1))
            assert found[2, row] == pytest.approx(rbo, abs=1e-6)

    def test_equal_and_disjoint_lists(self):
        a = torch.arange(10)[None]
        assert lists.agreement(a, a).flatten().tolist() == pytest.approx([1, 1, 1])
        assert lists.agreement(a, a + 10).flatten().tolist() == [0, 0, 0]
        # the same set in another order: the sets agree, the lists less so, and more so the later they differ
        late = a.clone()
        late[0, -2:] = late[0, -2:].flip(0)
        swapped, reordered = lists.agreement(a, late), lists.agreement(a, a.flip(1))
        assert swapped[1, 0] == reordered[1, 0] == 1
        assert 0.5 < reordered[2, 0] < swapped[2, 0] < 1


class TestDisplaced:
    base = torch.randn(50, 20, generator=torch.Generator().manual_seed(100))
    changed = base + 0.3 * torch.randn(50, 20, generator=torch.Generator().manual_seed(101)) + 0.1 * base

    @pytest.mark.parametrize("noise", lists.NOISES)
    def test_rows_move_as_far_as_they_did(self, noise):
        moved = lists.displaced(self.base, self.changed, 0, noise)
        size, expected = ((x - self.base).norm(dim=1) for x in (moved, self.changed))
        torch.testing.assert_close(size, expected)
        direction = torch.nn.functional.cosine_similarity(moved - self.base, self.changed - self.base, dim=1)
        assert direction.abs().mean() < 0.5
        assert torch.equal(moved, lists.displaced(self.base, self.changed, 0, noise))
        assert not torch.equal(moved, lists.displaced(self.base, self.changed, 1, noise))

    def test_angle_keeps_the_angle_and_the_length(self):
        moved = lists.displaced(self.base, self.changed, 0, "angle")
        cosine = torch.nn.functional.cosine_similarity
        torch.testing.assert_close(cosine(moved, self.base, dim=1), cosine(self.changed, self.base, dim=1))
        torch.testing.assert_close(moved.norm(dim=1), self.changed.norm(dim=1))
        rescaled = lists.displaced(self.base, 2 * self.base, 0, "angle")
        torch.testing.assert_close(rescaled, 2 * self.base)

    def test_shuffle_uses_changes_of_other_rows(self):
        moved = lists.displaced(self.base, self.changed, 0, "shuffle") - self.base
        unit = torch.nn.functional.normalize
        match = unit(moved, dim=1) @ unit(self.changed - self.base, dim=1).T
        donor = match.argmax(1)
        torch.testing.assert_close(match.max(1).values, torch.ones(50))
        assert sorted(donor.tolist()) == list(range(50))
        assert (donor != torch.arange(50)).all()

    @pytest.mark.parametrize("noise", lists.NOISES)
    def test_rows_that_did_not_move_stay(self, noise):
        torch.testing.assert_close(lists.displaced(self.base, self.base.clone(), 0, noise), self.base)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_the_written_out_cosines_and_equal_models_agree(family):
    bridge = tiny_bridge(family)
    found = compare(bridge, bridge, noise_seeds=1)
    for side in found.values["side"].values:
        for layer in range(N_LAYERS):
            labels = found.label_ids.sel(side=side, layer=layer)
            assert (labels.values == _labels(bridge, str(side), layer).numpy()).all()
    assert float(found.values.min()) == pytest.approx(1, abs=1e-6)
    assert float(found.noise.min()) == pytest.approx(1, abs=1e-6)
    assert float(found.moved.max()) == 0


def test_labels_are_those_of_the_atlas():
    bridge = tiny_bridge("neox")
    atlas, found = decode(bridge, weights=None, null=None), compare(bridge, bridge, noise_seeds=1)
    for side in atlas.sides:
        assert (found.label_ids.sel(model="base", side=side).values == atlas.best(side)).all()


@pytest.mark.parametrize("score", lists.SCORES)
def test_lists_are_those_of_the_full_product(score):
    bridge = tiny_bridge("llama")
    vectors, head = side_vectors(bridge, 1, "in"), unembedding(bridge)
    values, ids = lists.label_lists(vectors, lists.prepared(head, score), 7, score, BUDGET)
    if score == "centred_cosine":
        head = head - head.mean(1, keepdim=True)
    product = vectors @ head
    if score != "dot":
        product = product / vectors.norm(dim=1, keepdim=True) / head.norm(dim=0)
    expected = product.topk(7, dim=1)
    torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids.long(), expected.indices)
    tuned = fresh_bridge("llama")
    _nudge(tuned, "W_in", 0.3)
    found = compare(bridge, tuned, weights="in", score=score, noise_seeds=1)
    np.testing.assert_allclose(
        found.margin.sel(side="in", layer=1), expected.values[:, 0] - expected.values[:, 1], atol=1e-5
    )


class TestParts:
    def test_a_change_of_one_weight_shows_where_it_was_made(self):
        tuned = fresh_bridge("llama")
        _nudge(tuned, "W_in", 0.4)
        found = compare(tiny_bridge("llama"), tuned, noise_seeds=1)
        kept = found.values.sel(statistic="top").mean("neuron")
        assert float(kept.sel(part="neurons", side="in", layer=1)) < 0.95
        kept.loc[{"part": "neurons", "side": "in", "layer": 1}] = 1
        kept.loc[{"part": "both", "side": "in", "layer": 1}] = 1
        assert (kept == 1).all()
        assert (found.moved.sel(side="in", layer=1) > 0.1).all()
        assert (found.noise.sel(part="head") == 1).all()  # the unembedding did not move, so neither does its noise
        assert float(found.moved.sel(side=["gate", "out"]).max()) == 0

    def test_a_change_of_the_head_alone(self):
        tuned = fresh_bridge("llama", tie_word_embeddings=False)
        base = tiny_bridge("llama", tie_word_embeddings=False)
        with torch.no_grad():
            tuned.W_U.add_(0.1 * torch.randn(tuned.W_U.shape, generator=torch.Generator().manual_seed(0)))
        found = compare(base, tuned, weights="out", noise_seeds=1)
        assert (found.values.sel(part="neurons") == 1).all()
        assert (found.noise.sel(part="neurons") == 1).all()
        xr.testing.assert_identical(found.values.sel(part="both", drop=True), found.values.sel(part="head", drop=True))
        assert float(found.values.sel(part="head", statistic="top").mean()) < 0.95
        assert found.provenance["head_moved"] > 0.2


class TestFloor:
    def test_a_random_change_is_at_its_floor(self):
        base, tuned = fresh_bridge("llama", intermediate_size=400), fresh_bridge("llama", intermediate_size=400)
        for layer in range(N_LAYERS):
            _nudge(tuned, "W_in", 0.4, seed=layer, layer=layer)
        for noise in lists.NOISES:
            row = compare(base, tuned, weights="in", noise=noise, noise_seeds=2).summary(part="neurons").iloc[0]
            assert row["kept"] < 0.9
            assert row["excess_low"] < 0.015
            assert row["excess_high"] > -0.015
            assert abs(row["jaccard"] - row["jaccard_noise"]) < 0.03

    def test_a_change_aimed_at_the_labels_is_far_below(self):
        base, tuned = tiny_bridge("llama"), _aimed_at_labels()
        found = compare(base, tuned, weights="out", fold=False, noise_seeds=1)
        layer = found.summary(("side", "layer")).set_index("layer").loc[1]
        assert layer["kept"] < 0.2
        assert layer["excess_high"] < -0.4
        changed = found.changed(5)
        assert set(changed["layer"]) == {1}
        assert changed["margin"].is_monotonic_decreasing
        assert changed["base"].str.fullmatch(r"w\d+|<\w+>").all()

    def test_rescaling_keeps_every_label_and_only_the_angle_floor_knows(self):
        tuned = fresh_bridge("llama")
        with torch.no_grad():
            tuned.blocks[0].mlp.W_out.mul_(1.6)
        rows = {
            noise: compare(tiny_bridge("llama"), tuned, weights="out", noise=noise, noise_seeds=1)
            .summary("layer")
            .iloc[0]
            for noise in ("norm", "angle")
        }
        assert rows["norm"]["kept"] == rows["angle"]["kept"] == 1
        assert rows["angle"]["noise"] == 1
        assert rows["norm"]["noise"] < 0.9
        assert rows["norm"]["moved"] == pytest.approx(0.6, abs=1e-5)

    def test_labels_with_a_large_margin_outlive_more(self):
        tuned = fresh_bridge("llama")
        for layer in range(N_LAYERS):
            _nudge(tuned, "W_in", 0.4, seed=layer, layer=layer)
        table = compare(tiny_bridge("llama"), tuned, weights="in", noise_seeds=2).summary(("side", "margin_bin"))
        assert table["margin_bin"].tolist() == [1, 2, 3, 4]
        assert table["neurons"].tolist() == [D_MLP * N_LAYERS // 4] * 4
        assert table["kept"].iloc[3] > table["kept"].iloc[0] + 0.3
        assert table["noise"].is_monotonic_increasing

    def test_planted_neurons_are_the_specific_ones(self):
        base = fresh_bridge("gpt2")
        head = unembedding(base)
        with torch.no_grad():
            base.blocks[2].mlp.W_out[:20] = 5 * (head - head.mean(1, keepdim=True)).T[10:30]
        neurons = compare(base, base, weights="out", noise_seeds=1).neurons()
        found = neurons[neurons["specific"]].set_index(["layer", "neuron"])["base"]
        assert found.loc[2].loc[:19].tolist() == [f"w{token}" for token in range(10, 30)]
        assert len(found) <= 22  # two false ones are within what a rate of 5 % lets through by chance


def test_result_round_trip_and_figures(tmp_path):
    tuned = fresh_bridge("gemma2")
    _nudge(tuned, "W_gate", 0.3)
    found = compare(tiny_bridge("gemma2"), tuned, weights=["gate", "out"], noise_seeds=2)
    assert found.summary()["side"].tolist() == ["gate", "out"]
    loaded = AtlasComparison.load(found.save(tmp_path / "compared.nc"))
    assert loaded.summary(("side", "specific")).equals(found.summary(("side", "specific")))
    assert loaded.provenance["tuned"]["revision"] != loaded.provenance["revision"]
    assert {trace.name for trace in found.plot().data} >= {"gate", "out"}
    assert found.plot("neurons", x="margin_bin").data


class TestErrors:
    def test_models(self):
        base = tiny_bridge("llama")
        with pytest.raises(ValueError, match=r"base has gated True and tuned False|base has d_mlp"):
            compare(base, tiny_bridge("gpt2"))
        with pytest.raises(ValueError, match=f"base has d_mlp {D_MLP} and tuned 40"):
            compare(base, tiny_bridge("llama", intermediate_size=40))
        other = fresh_bridge("llama")
        other.tokenizer = _reversed_tokenizer()
        with pytest.raises(ValueError, match=r"\d+ of 60 tokens of tuned have another id in base"):
            compare(base, other)
        training = fresh_bridge("llama").train()
        with pytest.raises(RuntimeError, match="training mode"):
            compare(base, training)

    def test_options(self, unchecked):
        bridge = tiny_bridge("gpt2")
        with pytest.raises(ValueError, match="has no gate"):
            compare(bridge, bridge, weights="gate")
        with pytest.raises(ValueError, match=f"k must lie between 1 and the {D_VOCAB} tokens"):
            compare(bridge, bridge, k=0)
        with pytest.raises(ValueError, match="noise_seeds must be at least 1, got 0"):
            compare(bridge, bridge, noise_seeds=0)
        with pytest.raises(ValueError, match="got 'prob'"):
            compare(bridge, bridge, score="prob")  # pyright: ignore
        with pytest.raises(ValueError, match="got 'uniform'"):
            compare(bridge, bridge, noise="uniform")  # pyright: ignore
        with pytest.raises(ValueError, match="name each side once"):
            compare(bridge, bridge, weights=["in", "in"])
        found = compare(bridge, bridge, noise_seeds=1)
        with pytest.raises(ValueError, match="by is"):
            found.summary("token")
        with pytest.raises(ValueError, match="part must be one of"):
            found.summary(part="all")  # pyright: ignore


def _reversed_tokenizer():
    import copy
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    words = raw["model"]["vocab"]
    raw["model"]["vocab"] = {word: (place if place < 3 else 62 - place) for word, place in words.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.init_kwargs.update(copy.copy(tiny_tokenizer().init_kwargs))
    return fast


class TestBirths:
    def _models(self):
        """W_in of layer 0 is final from step 10 on, of layer 1 at the end only; of layer 2 always but at step 10."""
        first, middle, last = (fresh_bridge("llama") for _ in range(3))
        for bridge, layers in ((first, (0, 1)), (middle, (1, 2))):
            for layer in layers:
                _nudge(bridge, "W_in", 5.0, seed=layer + 7, layer=layer)
        return first, middle, last

    def test_planted_births(self, tmp_path):
        first, middle, last = self._models()
        found = label_births({0: first, 30: last, 10: middle}, weights="in")
        births = found.values.sel(side="in")
        assert (births.sel(layer=0) == 10).mean() > 0.9  # a few have their label from the start by chance
        assert (births.sel(layer=1) == 30).mean() > 0.9
        assert (births.sel(layer=2) == 30).mean() > 0.9
        kept = found.agreement.sel(curve="measured", side="in")
        assert kept.sel(layer=2, step=0) == 1
        assert kept.sel(layer=2, step=10) < 0.2
        assert (kept.sel(step=30) == 1).all()
        assert (found.label_ids.sel(side="in", layer=1).values == _labels(last, "in", 1).numpy()).all()
        steps = found.by_step().set_index("step")
        assert steps["born"].is_monotonic_increasing
        assert steps.loc[30, "displaced"] == 1
        assert steps.loc[0, "shuffled"] < 0.1
        loaded = LabelBirths.load(found.save(tmp_path / "births.nc"))
        assert loaded.table().equals(found.table())
        assert {trace.name for trace in found.plot().data} >= {"in", "random displacement"}

    def test_displacement_and_shuffling_are_what_they_say(self):
        first, middle, last = self._models()
        found = label_births({0: first, 10: middle, 30: last}, weights="in")
        displaced = found.agreement.sel(curve="displaced", side="in")
        # only W_in of some layers moved; a layer that did not keeps its labels under the displacement
        assert displaced.sel(layer=2, step=0) == 1
        assert displaced.sel(layer=1, step=0) < 0.3
        a, b = (_labels(bridge, "in", 1).numpy() for bridge in (first, last))
        chance = np.mean([(np.random.default_rng(i).permutation(a) == b).mean() for i in range(2000)])
        assert float(found.agreement.sel(curve="shuffled", side="in", layer=1, step=0)) == pytest.approx(
            chance, abs=4e-3
        )

    def test_a_label_that_was_not_there_may_yet_outlive_a_displacement(self):
        found = label_births({0: _aimed_at_labels(), 10: tiny_bridge("llama")}, weights="out", fold=False)
        curves = found.agreement.sel(side="out", layer=1, step=0)
        assert curves.sel(curve="measured") < 0.2
        assert curves.sel(curve="displaced") > 0.6

    def test_models_are_loaded_when_it_is_their_turn(self):
        order = []

        def loader(step):
            def load():
                order.append(step)
                return tiny_bridge("gpt2", seed=step)

            return load

        found = label_births({step: loader(step) for step in (0, 1, 2)}, weights="out")
        assert order == [2, 1, 0]
        specific = found.by_step(specific=True)
        assert set(specific["neurons"]) <= {0, *range(1, 3 * D_MLP)}

    def test_errors(self):
        bridge = tiny_bridge("llama")
        with pytest.raises(ValueError, match="1 checkpoint; births need at least two"):
            label_births({5: bridge})
        with pytest.raises(ValueError, match=f"step 5 has d_mlp {D_MLP} and step 0 40"):
            label_births({0: tiny_bridge("llama", intermediate_size=40), 5: bridge})


class TestRobustness:
    def test_labels_go_with_the_size_and_a_tuned_model_can_be_read_on_the_curve(self):
        base, tuned = (fresh_bridge("llama", intermediate_size=400) for _ in range(2))
        for layer in range(N_LAYERS):
            _nudge(tuned, "W_out", 0.3, seed=layer + 50, layer=layer)
        found = label_robustness(base, (0.01, 0.1, 0.3, 1), move="neurons", weights="out", noise_seeds=3)
        kept = found.table()["kept"]
        assert kept.is_monotonic_decreasing
        assert kept.iloc[0] > 0.95
        assert kept.iloc[-1] < 0.5
        # rows of `tuned` moved by 0.3 of an average row's norm: the curve at 0.3 says how many labels that leaves
        row = compare(base, tuned, weights="out", noise_seeds=1).summary(part="neurons").iloc[0]
        assert row["moved"] == pytest.approx(0.3, abs=0.03)
        assert row["kept"] == pytest.approx(kept.iloc[2], abs=0.05)
        assert found.size_for(float(kept.iloc[1]))["out"] == pytest.approx(0.1, rel=1e-5)
        assert 0.1 < found.size_for(float(kept.iloc[1:3].mean()))["out"] < 0.3
        assert np.isnan(found.size_for(0.01)["out"])
        assert found.plot().data

    def test_what_is_moved(self):
        bridge = tiny_bridge("gpt2")
        kept = {
            move: float(label_robustness(bridge, [0.4], move=move, weights="in", noise_seeds=2).values.mean())
            for move in ("neurons", "head", "both")
        }
        assert kept["both"] < min(kept["neurons"], kept["head"])

    def test_errors(self):
        bridge = tiny_bridge("gpt2")
        with pytest.raises(ValueError, match="positive numbers, ascending"):
            label_robustness(bridge, [0.2, 0.1])
        with pytest.raises(ValueError, match="noise_seeds must be at least 1"):
            label_robustness(bridge, [0.1], noise_seeds=0)
        with pytest.raises(ValueError, match="kept must lie between 0 and 1, got 75.4"):
            label_robustness(bridge, [0.1], noise_seeds=1, weights="in").size_for(75.4)


def _pruned(layer: int = 1, n: int = 12, **changes):
    """The first neurons of a layer write nothing, or next to nothing."""
    bridge = fresh_bridge("llama", **changes)
    with torch.no_grad():
        bridge.blocks[layer].mlp.W_out[: n // 2] = 0.0
        bridge.blocks[layer].mlp.W_out[n // 2 : n] *= 1e-8
    return bridge


class TestDead:
    @pytest.mark.parametrize("score", ["centred_cosine", "dot"])
    def test_dead_neurons_keep_no_label(self, score, tmp_path):
        base, tuned = _pruned(), _pruned(n=20)
        _nudge(tuned, "W_out", 0.4, layer=0)
        found = compare(base, tuned, weights=["in", "out"], score=score, noise_seeds=2)
        for array in (found.values, found.noise):
            dead = np.isnan(array.sel(side="out", layer=1).values)
            assert dead[..., :12].all()  # in the base model: no label to keep
            assert not dead[..., 20:].any()
            at = [PARTS.index("both"), PARTS.index("neurons")]
            assert dead[at][..., 12:20].all()  # in the tuned one
            assert not dead[PARTS.index("head")][..., 12:20].any()
            assert not np.isnan(array.sel(side="in").values).any()
        assert not np.isnan(found.floor.values).any()
        assert (found.label_ids.sel(model="base", side="out", layer=1).values[:12] == -1).all()
        assert (found.label_ids.sel(model="tuned", side="out", layer=1).values[:20] == -1).all()
        assert np.isnan(found.q_value.sel(side="out", layer=1).values[:12]).all()
        rows = found.summary(("side", "layer")).set_index(["side", "layer"])
        assert rows["neurons"].tolist() == [D_MLP] * 4 + [D_MLP - 20, D_MLP]
        assert rows.loc[("out", 1), "kept"] == rows.loc[("out", 1), "jaccard"] == 1
        assert not rows.isna().any(axis=None)
        table = found.neurons().set_index(["side", "layer", "neuron"])
        assert table.loc[("out", 1, 0), "base"] == table.loc[("out", 1, 19), "tuned"] == ""
        assert table.loc[("out", 1, 0), "margin_bin"] == 0
        assert not (found.changed(500)["base"] == "").any()
        assert found.summary(("side", "margin_bin"))["margin_bin"].min() == 1
        again = AtlasComparison.load(found.save(tmp_path / "dead.nc"))
        assert again.summary().equals(found.summary())

    @pytest.mark.parametrize("score", ["centred_cosine", "dot"])
    def test_dead_neurons_are_specific_to_nothing_and_do_not_lower_the_null(self, score):
        bridge, alive = _pruned(n=24), slice(24, None)
        head, rows = lists.prepared(unembedding(bridge), score), side_vectors(bridge, 1, "out")
        null = lists.null_tops(rows, head, score, 0, 30, BUDGET).reshape(30, D_MLP)
        assert null[:, :24].isnan().all()
        assert (null[:, alive] > 0).all()
        tops = lists.label_lists(rows, head, 1, score, BUDGET)[0].T
        assert tops[:, :24].isnan().all()
        q = lists.specificity(tops, null.reshape(1, -1), score)
        assert np.isnan(q[:, :24]).all()
        np.testing.assert_array_equal(
            q[:, alive], lists.specificity(tops[:, alive], null[:, alive].reshape(1, -1), score)
        )
        few = lists.specificity(tops, null[:1, :30], score)  # six null scores are no null
        assert np.isnan(few).all()

    def test_dead_neurons_are_not_born(self):
        first, last = _pruned(n=20), _pruned()
        found = label_births({0: first, 10: last}, weights="out")
        births = found.values.sel(side="out", layer=1).values
        assert np.isnan(births[:12]).all()
        assert (births[12:20] == 10).all()  # no label at first
        assert (births[20:] == 0).all()
        assert not found.has_final.sel(side="out", layer=1, step=10).values[:12].any()
        share = found.agreement.sel(side="out", layer=1, step=0)
        assert float(share.sel(curve="measured")) == pytest.approx(28 / 36)
        assert 28 / 36 - 1e-6 <= float(share.sel(curve="displaced")) < 1
        ids = _labels(last, "out", 1).numpy()
        chance = np.mean(ids[20:, None] == ids[None, 12:]) * 28 / 36
        assert float(share.sel(curve="shuffled")) == pytest.approx(chance, abs=1e-6)
        assert float(found.agreement.sel(side="out", layer=1, step=10, curve="measured")) == 1
        steps = found.by_step().set_index("step")
        assert steps.loc[10, "neurons"] == 3 * D_MLP - 12
        assert steps.loc[10, "born"] == steps.loc[10, "has_final"] == 1
        assert steps.loc[0, "has_final"] == pytest.approx(1 - 8 / (3 * D_MLP - 12))
        assert (found.label_ids.sel(side="out", layer=1).values[:12] == -1).all()
        assert found.table().set_index(["layer", "neuron"]).loc[(1, 0), "label"] == ""

    def test_dead_neurons_have_no_robustness(self):
        found = label_robustness(_pruned(), [0.01, 2.0], weights="out", noise_seeds=1)
        kept = found.values.sel(side="out", layer=1).values
        assert np.isnan(kept[:, :12]).all()
        assert not np.isnan(kept[:, 12:]).any()
        assert np.isnan(found.values.values).sum() == 24
        table = found.table().set_index("size")
        assert table.loc[0.01, "kept"] > 0.9 > table.loc[2.0, "layer_high"]
