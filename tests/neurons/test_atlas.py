"""Questions put to an atlas, against a search through its lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp import results
from interp.neurons import NeuronAtlas, decode, hubness
from tests.helpers import D_MLP, D_VOCAB, N_LAYERS, fresh_bridge, tiny_bridge

SIDES = ["in", "gate", "out"]


@pytest.fixture(scope="module")
def atlas() -> NeuronAtlas:
    return decode(tiny_bridge("llama"), weights=["out", "gate", "in"], top_k=5)


def listed(atlas: NeuronAtlas, token: int, sides: list[str]) -> set[tuple[Any, ...]]:
    found = set()
    for sign, ids, values in ((1, atlas.top_ids, atlas.top_values), (-1, atlas.bottom_ids, atlas.bottom_values)):
        for place, side in enumerate(atlas.sides):
            for cell in zip(*np.nonzero(ids.values[place] == token), strict=True):
                if side in sides:
                    found.add(
                        (side, *(int(x) for x in cell[:2]), sign, int(cell[2]), float(values.values[place][cell]))
                    )
    return found


@pytest.mark.parametrize("token", [0, 1, 9, D_VOCAB - 1])
def test_neurons_by_token_are_those_that_have_it_in_their_lists(atlas: NeuronAtlas, token: int) -> None:
    for frame, sides in ((atlas.reads(token), ["in", "gate"]), (atlas.writes(token), ["out"])):
        rows = frame[["side", "layer", "neuron", "sign", "rank", "value"]].itertuples(index=False, name=None)
        assert len(frame) > 5 and set(rows) == listed(atlas, token, sides)
        assert (np.diff(frame["value"].abs()) <= 0).all()
        each: Any = frame.itertuples()
        for row in each:
            cell = {"side": row.side, "layer": row.layer, "neuron": row.neuron}
            assert (row.z, row.q) == (float(atlas.z.sel(cell)), float(atlas.q.sel(cell)))


def test_neurons_that_read_one_token_and_write_another(atlas: NeuronAtlas) -> None:
    pairs = 0
    for a, b in ((3, 4), (10, 20), (7, 7)):
        expected = {
            (*read[1:3], read[0], *read[3:], write[0], *write[3:])
            for read in listed(atlas, a, ["in", "gate"])
            for write in listed(atlas, b, ["out"])
            if read[1:3] == write[1:3]
        }
        found = atlas.search(reads=f"w{a}", writes=b)
        columns = [f"{which}_{name}" for which in ("reads", "writes") for name in ("side", "sign", "rank", "value")]
        assert list(found) == ["layer", "neuron", *columns]
        assert set(found.itertuples(index=False, name=None)) == expected
        weaker = found[["reads_value", "writes_value"]].abs().min(axis=1)
        assert (np.diff(weaker) <= 0).all()
        pairs += len(found)
    assert pairs > 3
    pd.testing.assert_frame_equal(atlas.search(reads=9), atlas.reads("w9"))
    pd.testing.assert_frame_equal(atlas.search(writes=9), atlas.writes("w9"))
    with pytest.raises(ValueError, match="search needs reads= or writes= or both"):
        atlas.search()


def test_a_planted_relation_is_found_by_its_two_tokens() -> None:
    bridge = fresh_bridge("neox")
    head = bridge.original_model.get_output_embeddings().weight
    with torch.no_grad():
        bridge.blocks[1].mlp.W_in[:, 6] = head[30]
        bridge.blocks[1].mlp.W_out[6] = -head[31]
    found = decode(bridge, weights=["in", "out"], fold=False).search(reads="w30", writes="w31").iloc[0]
    assert found[["layer", "neuron", "reads_rank", "writes_rank"]].tolist() == [1, 6, 0, 0]
    assert (found["reads_sign"], found["writes_sign"]) == (1, -1)
    assert found["reads_value"] > 0.9 and found["writes_value"] < -0.9


def test_one_neuron(atlas: NeuronAtlas) -> None:
    frame = atlas.neuron(2, 7)
    assert list(frame) == ["side", "sign", "rank", "token", "id", "value"] and len(frame) == 3 * 2 * 5
    for place, side in enumerate(["out", "gate", "in"]):
        for sign, ids, values in ((1, atlas.top_ids, atlas.top_values), (-1, atlas.bottom_ids, atlas.bottom_values)):
            part = frame[(frame["side"] == side) & (frame["sign"] == sign)]
            assert part["id"].tolist() == ids.values[place, 2, 7].tolist() and part["rank"].tolist() == list(range(5))
            assert np.array_equal(part["value"].astype(np.float32), values.values[place, 2, 7])
            assert part["token"].tolist() == [atlas.token_strings[i] for i in part["id"]]
    with pytest.raises(ValueError, match=r"no neuron \(0, 48\); layers are 0 to 2, neurons 0 to 47"):
        atlas.neuron(0, 48)
    with pytest.raises(ValueError, match=r"layer 1 was not decoded; \[0\] were"):
        decode(tiny_bridge("llama"), layers=[0], null=None).neuron(1, 0)


def test_labels_are_the_tokens_of_the_peaks(atlas: NeuronAtlas) -> None:
    frame = atlas.labels()
    assert len(frame) == 3 * N_LAYERS * D_MLP and (frame["sign"] == -1).any() and (frame["sign"] == 1).any()
    each: Any = frame.sample(60, random_state=0).itertuples()
    for row in each:
        cell = atlas.sides.index(row.side), row.layer, row.neuron
        top, bottom = float(atlas.top_values.values[(*cell, 0)]), float(atlas.bottom_values.values[(*cell, 0)])
        ids = atlas.top_ids if top >= -bottom else atlas.bottom_ids
        assert row.id == int(ids.values[(*cell, 0)]) and row.value == (top if top >= -bottom else bottom)
        assert row.sign == np.sign(row.value) and (row.token == f"w{row.id}" or row.id < 3)
        assert (row.z, row.p, row.q) == tuple(float(part.values[cell]) for part in (atlas.z, atlas.p, atlas.q))
    counts = frame.groupby("side")["id"].value_counts()
    for (side, token), count in counts.items():  # pyright: ignore[reportGeneralTypeIssues]
        assert int(atlas.label_counts.sel(side=side)[token]) == count
    assert int(atlas.label_counts.sum()) == len(frame)
    gates: Any = frame[frame["side"] == "gate"]
    pd.testing.assert_frame_equal(atlas.labels("gate"), gates.reset_index(drop=True))
    assert (atlas.best("gate") == atlas.top_ids.values[1, :, :, 0]).all()
    assert (atlas.best("in", -1) == atlas.bottom_ids.values[2, :, :, 0]).all()


def test_hub_tokens_are_marked() -> None:
    bridge = fresh_bridge("gpt2")
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.W_out[:20] += 3 * bridge.original_model.lm_head.weight[33]
    atlas = decode(bridge, weights=["in", "out"])
    frame, hubs = atlas.labels(), hubness(atlas).is_hub.values
    assert (frame["hub"] == hubs[(frame["side"] == "out").astype(int), frame["id"]]).all()
    marked = frame[frame["hub"]]
    assert len(marked) >= 50 and set(marked["side"]) == {"out"} and 33 in set(marked["id"])


def test_specialised_neurons_are_the_rows_with_a_small_q(atlas: NeuronAtlas) -> None:
    frame = atlas.labels()
    level = float(frame["q"].quantile(0.3)) + 1e-6
    assert 0 < level < 1
    found = atlas.specialised(q=level)
    assert len(found) == int((frame["q"] <= level).sum()) > 0 and (np.diff(found["z"]) <= 0).all()
    assert set(atlas.specialised(q=0.999999, side="in")["side"]) <= {"in"}
    for q in (0.0, 1.0, 5.0):
        with pytest.raises(ValueError, match=f"q={q}; expected a share"):
            atlas.specialised(q=q)


def test_tokens_by_text(atlas: NeuronAtlas) -> None:
    assert atlas.token_id("w9") == 9 and atlas.token_id(9) == 9
    for token, message in (
        (" w9", r"no token has the text ' w9'\. Did you mean 'w9'\?"),
        ("w99", "Did you mean"),
        (D_VOCAB, f"no token {D_VOCAB}; ids are 0 to {D_VOCAB - 1}"),
        (-1, "no token -1"),
    ):
        with pytest.raises(ValueError, match=message):
            atlas.token_id(token)
    twice = list(atlas.token_strings)
    twice[5] = "w9"
    object.__setattr__(atlas, "token_strings", twice)
    with pytest.raises(ValueError, match=r"2 tokens have the text 'w9': ids \[5, 9\]; give the id"):
        atlas.token_id("w9")
    del atlas.__dict__["token_strings"]


def test_a_model_without_a_tokenizer_has_ids_for_texts() -> None:
    bridge = fresh_bridge("gpt2")
    bridge.tokenizer = None
    atlas = decode(bridge, null=None)
    assert atlas.token_strings == [f"#{i}" for i in range(D_VOCAB)] and len(atlas.writes("#7")) == len(atlas.writes(7))


def test_sides_that_were_not_decoded_are_refused() -> None:
    writes, reads = (decode(tiny_bridge("llama"), weights=side, null=None) for side in ("out", "gate"))
    with pytest.raises(ValueError, match="no reading side"):
        writes.reads(3)
    with pytest.raises(ValueError, match="no writing side"):
        reads.search(reads=3, writes=4)
    with pytest.raises(ValueError, match="no side 'in'; it has 'out'"):
        writes.best("in")


def test_saved_and_read_again(atlas: NeuronAtlas, tmp_path: Path) -> None:
    atlas.save(tmp_path / "atlas.nc")
    for again in (NeuronAtlas.load(tmp_path / "atlas.nc"), results.load(tmp_path / "atlas.nc")):
        assert isinstance(again, NeuronAtlas) and again.sides == ["out", "gate", "in"]
        assert again.token_strings == atlas.token_strings and again.provenance == atlas.provenance
        pd.testing.assert_frame_equal(again.labels(), atlas.labels())
        pd.testing.assert_frame_equal(again.reads(9), atlas.reads(9))
    without = decode(tiny_bridge("gpt2"), null=None)
    without.save(tmp_path / "b.nc")
    assert NeuronAtlas.load(tmp_path / "b.nc").null_peaks is None


def test_what_every_result_can_do(atlas: NeuronAtlas) -> None:
    assert repr(atlas) == "NeuronAtlas(side 3 x layer 3 x neuron 48; tiny-llama)"
    top = atlas.top(3)
    assert top["value"].abs().max() == abs(atlas.values).max() and {"side", "layer", "neuron"} <= set(top)
    assert atlas.values.attrs["unit"] == "cosine"
    assert atlas.provenance["method"] == "decode" and atlas.provenance["score"] == "centred_cosine"


@pytest.mark.parametrize("score", ["centred_cosine", "dot", "prob"])
def test_the_figure_shows_peaks_and_null_peaks_on_one_scale(score: Any) -> None:
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.W_out.mul_(5)
    atlas = decode(bridge, weights=["in", "out"], score=score)
    figure = atlas.plot()
    lines = {trace.name: trace for trace in figure.data if trace.name and trace.mode and "lines" in trace.mode}
    assert {"in", "in, null", "out", "out, null"} <= set(lines)
    ratio = np.array(lines["out"].y, float) / np.array(lines["out, null"].y, float)
    assert len(ratio) == N_LAYERS and (ratio > 0.8).all() and (ratio < 1.25).all()  # a random model is its own null
    assert len(decode(tiny_bridge("llama"), null=None).plot().data) < len(figure.data)
