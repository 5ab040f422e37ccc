from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import metrics
from interp.prompts import Prompts, concatenate
from tests.prompts.builders import stub, word_level


def make(n: int = 4, length: int = 6, seed: int = 0, **changes: Any) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 14, (n, length), generator=generator)
    clean[:, 0] = 0
    corrupted = clean.clone()
    corrupted[:, 2] = 3 + (clean[:, 2] - 3 + 1) % 11
    fields = {
        "clean": clean,
        "corrupted": corrupted,
        "answers": torch.arange(n) + 3,
        "foils": torch.arange(n) + 4,
        "positions": {"subject": torch.full((n,), 2)},
        "labels": {"kind": tuple("abcdefgh"[:n])},
        "name": "made",
        "seed": seed,
    }
    return Prompts(**{**fields, **changes})


def assert_same(a: Prompts, b: Prompts) -> None:
    for key in ("clean", "corrupted", "answers", "foils"):
        assert torch.equal(getattr(a, key), getattr(b, key)), key
    assert list(a.positions) == list(b.positions)
    assert all(torch.equal(a.positions[key], b.positions[key]) for key in a.positions)
    for key in ("labels", "answer_sets", "foil_sets", "strings", "name", "seed"):
        assert getattr(a, key) == getattr(b, key), key


def test_end_is_the_last_token_unless_named() -> None:
    assert make().positions["end"].tolist() == [5] * 4
    assert make(positions={"end": torch.tensor([1, 2, 3, 4])}).positions["end"].tolist() == [1, 2, 3, 4]
    bare = Prompts(
        torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3).long(), torch.tensor([1, 1]), torch.tensor([2, 2])
    )
    assert bare.clean.dtype == torch.long
    assert list(bare.positions) == ["end"]
    assert bare.labels == {}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted": torch.ones(4, 5).long()}, r"clean has shape \(4, 6\) and corrupted \(4, 5\).*groups_from_text"),
        ({"clean": torch.ones(4, 6)}, "clean has dtype torch.float32; token ids are integers"),
        ({"clean": [[1, 2]]}, r"clean is a list; expected a tensor of token ids \[example, pos\]"),
        ({"answers": torch.ones(4, 1).long()}, r"answers has shape \(4, 1\); expected \[example\]"),
        ({"answers": torch.ones(3).long()}, "answers has 3 entries but there are 4 examples"),
        ({"foils": torch.tensor([4, 4, 6, 7])}, r"rows \[1\]: answer and foil are the same token \(4 in row 1\)"),
        ({"foils": torch.tensor([4, -1, 6, 7])}, "foils holds -1; token ids start at 0"),
        ({"positions": {"x": torch.tensor([0, 1, 6, 0])}}, r"positions\['x'\] is 6 in row 2; expected 0 to 5"),
        ({"positions": {"x": torch.tensor([0, -1, 0, 0])}}, r"positions\['x'\] is -1 in row 1"),
        ({"positions": {"x": torch.tensor([0, 1])}}, r"positions\['x'\].*expected one index per example"),
        ({"positions": {"x": 3}}, r"positions\['x'\] is 3; expected one index per example"),
        ({"labels": {"kind": ["a"]}}, r"labels\['kind'\] has 1 entries but there are 4"),
        ({"labels": {"kind": [object()] * 4}}, r"labels\['kind'\]\[0\] is a object; labels are plain"),
        ({"answer_sets": ((1,),)}, "answer_sets has 1 entries but there are 4"),
        ({"foil_sets": ((1,), (), (2,), (3,))}, r"foil_sets: rows \[1\] are empty"),
        ({"clean": torch.ones(4, 0).long(), "corrupted": torch.ones(4, 0).long()}, "rows of 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        make().name = "other"  # type: ignore[misc]


@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_indexing_takes_every_field_along(rows: list[int]) -> None:
    prompts = make(6, answer_sets=tuple((i + 1,) for i in range(6)), foil_sets=tuple((i + 9,) for i in range(6)))
    part = prompts[rows]
    assert len(part) == len(rows)
    for i, row in enumerate(rows):
        assert torch.equal(part.clean[i], prompts.clean[row])
        assert torch.equal(part.corrupted[i], prompts.corrupted[row])
        assert part.positions["end"][i] == prompts.positions["end"][row]
        assert part.answers[i] == prompts.answers[row]
        assert part.labels["kind"][i] == prompts.labels["kind"][row]
        assert part.answer_sets is not None
        assert part.answer_sets[i] == (row + 1,)


def test_index_slice_and_mask_agree() -> None:
    prompts = make()
    assert_same(prompts[2], prompts[2:3])
    assert_same(prompts[torch.tensor([False, False, True, True])], prompts[2:])
    assert_same(prompts[-1], prompts[[3]])
    assert [len(each) for each in prompts] == [1] * 4  # iterates over single examples
    with pytest.raises(IndexError):
        prompts[[4]]


def test_swap_exchanges_both_sides_and_negates_the_logit_difference() -> None:
    prompts = make(answer_sets=((1,),) * 4, foil_sets=((2,),) * 4)
    swapped = prompts.swap()
    assert torch.equal(swapped.clean, prompts.corrupted)
    assert torch.equal(swapped.answers, prompts.foils)
    assert swapped.answer_sets == prompts.foil_sets
    assert_same(swapped.swap(), prompts)
    logits = torch.randn(4, 6, 20)
    assert torch.allclose(metrics.logit_difference(swapped)(logits), -metrics.logit_difference(prompts)(logits))


def test_concatenate_undoes_slicing() -> None:
    prompts = make()
    assert_same(concatenate(prompts[:1], prompts[1:3], prompts[3:]), prompts)
    assert concatenate(prompts, make(seed=1)).seed is None


def test_concatenate_refuses_what_cannot_share_a_batch() -> None:
    with pytest.raises(ValueError, match="prompts of 6 and 7 tokens cannot share a batch without padding"):
        concatenate(make(), make(length=7))
    with pytest.raises(ValueError, match=r"different positions: \['subject'\]"):
        concatenate(make(), make(positions=None))
    with pytest.raises(ValueError, match=r"different labels: \['kind'\]"):
        concatenate(make(), make(labels=None))
    with pytest.raises(ValueError, match="some of the sets have answer_sets"):
        concatenate(make(), make(answer_sets=((1,),) * 4))
    with pytest.raises(ValueError, match="token 3 is 'a' in one set and 'b' in another"):
        concatenate(make(strings={3: "a"}), make(strings={3: "b"}))
    with pytest.raises(ValueError, match="at least one"):
        concatenate()


def test_save_and_load_give_the_same_prompts(tmp_path: Path) -> None:
    labels: dict[str, Any] = {"kind": ("a", None, 2, 1.5), "words": (("x", "y"),) * 4}
    prompts = make(labels=labels, answer_sets=((1, 2),) * 4, foil_sets=((3,),) * 4, strings={3: " the", 4: "é\n"})
    path = prompts.save(tmp_path / "deep" / "p.safetensors")
    assert_same(Prompts.load(path), prompts)
    assert_same(Prompts.load(make(seed=3)[1:3].save(path)), make(seed=3)[1:3])  # overwrites; slices are saved whole
    assert [file.name for file in path.parent.iterdir()] == ["p.safetensors"]  # no temporary left


def test_load_names_a_file_it_cannot_read(tmp_path: Path) -> None:
    path = make().save(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 9])
    with pytest.raises(ValueError, match=r"p.safetensors is truncated or not a file of prompts"):
        Prompts.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="truncated or not a file of prompts"):
        Prompts.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="format None, expected 'interp.prompts/1'"):
        Prompts.load(path)
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        Prompts.load(tmp_path / "absent")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "p.safetensors")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("interp.prompts._prompts.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(path)
    assert_same(Prompts.load(path), make())
    assert len(list(tmp_path.iterdir())) == 1


def test_shows_itself_token_by_token(words: Any) -> None:
    prompts = make(2).decoded(words)
    text = repr(prompts)
    assert "made: 2 examples of 6 tokens, seed 0; positions subject, end" in text
    assert text.count("«") == 2  # the one changed token, in both rows
    table = str(prompts.show(1)).splitlines()
    assert len(table) == 2 + 6 + 1
    assert table[4].split()[-1] == "subject"
    assert table[7].split()[-1] == "end"
    assert prompts.text(int(prompts.corrupted[1, 2])) in table[4]
    assert repr(prompts.show(-1)) == str(prompts.show(1))
    html = prompts._repr_html_()
    assert html.count("background") == 1 + 2 * 2
    assert "&lt;bos&gt;" in html
    assert "<bos>" not in html
    with pytest.raises(IndexError, match="row 2 of 2"):
        prompts.show(2)


def test_unknown_tokens_show_their_ids() -> None:
    assert make().tokens_str("corrupted")[0][0] == "#0"
    with pytest.raises(ValueError, match="'clean' or 'corrupted', got 'both'"):
        make().tokens_str("both")


def test_dataframe_has_one_row_per_example(words: Any) -> None:
    frame = make(labels={"kind": tuple("abcd"), "answer": (1, 2, 3, 4)}).decoded(words).to_dataframe()
    assert len(frame) == 4
    assert frame["answer"].tolist() == ["the", "cat", "dog", "sat"]
    assert frame["label_answer"].tolist() == [1, 2, 3, 4]  # a label never hides a column
    assert frame["pos_subject"].tolist() == [2] * 4
    assert frame["clean"][0].split()[0] == "<bos>"


def edited(row: int, changes: dict[int, int]) -> Prompts:
    clean: Tensor = make().clean.clone()
    for position, token in changes.items():
        clean[row, position] = token
    return make(clean=clean)


def test_check_accepts_good_prompts_and_gives_them_back(words: Any) -> None:
    prompts = make()
    assert prompts.check(words) is prompts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (edited(1, {3: 14}), r"clean: rows \[1\] hold token 14, but the model's vocabulary has 14"),
        (make(answers=torch.tensor([3, 4, 5, 99])), r"answers: rows \[3\] hold token 99"),
        (make(length=17), "17 tokens but the model's context is 16"),
        (edited(2, {0: 5}), r"clean: rows \[2\] do not start with BOS \(token 0, '<bos>'\)"),
        (edited(0, {1: 0}), r"clean: rows \[0\] hold BOS \(token 0\) again"),
        (edited(3, {0: 1, 1: 0}), r"BOS \(token 0\) again"),
        (edited(3, {0: 1}), r"rows \[3\] hold the padding token 1 \('<pad>'; row 3: left\).*groups_from_text"),
        (edited(1, {5: 1}), r"rows \[1\] hold the padding token 1 \('<pad>'; row 1: right\)"),
        (edited(1, {3: 1}), "row 1: inside"),
    ],
)
def test_check_refuses_what_the_model_would_misread(words: Any, prompts: Prompts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts.check(words)


def test_check_with_padding_that_is_also_bos() -> None:
    tokenizer = word_level()
    tokenizer.pad_token = "<bos>"
    bridge = stub(tokenizer, n_ctx=16)
    make().check(bridge)
    for position in (1, 5):
        with pytest.raises(ValueError, match=r"rows \[2\] hold token 0 .*both BOS and padding"):
            edited(2, {position: 0}).check(bridge)


def test_check_with_padding_that_is_also_the_end_of_text() -> None:
    tokenizer = word_level()
    tokenizer.eos_token = "<pad>"
    bridge = stub(tokenizer, n_ctx=16)
    edited(1, {3: 1}).check(bridge)  # an end of text between two documents
    with pytest.raises(ValueError, match="row 1: right"):
        edited(1, {5: 1}).check(bridge)


def test_check_without_bos_or_without_a_tokenizer() -> None:
    without = make(clean=make().clean.clamp(min=3), corrupted=make().corrupted.clamp(min=3))
    without.check(stub(word_level(), n_ctx=16, bos=False))
    without.check(stub(None, n_ctx=16, d_vocab=14))
    with pytest.raises(ValueError, match="set bridge.cfg.default_prepend_bos = False if the model is to run without"):
        without.check(stub(word_level(), n_ctx=16))
