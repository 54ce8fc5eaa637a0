"""The retrieval probe: what asks for what, ranks by hand, whitening, and collapse."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simlm.errors import TrainingError
from simlm.objectives.probe import Probe, whitened
from simlm.recipe import ProbeSettings
from tests.conftest import build_bpe, build_store, build_unigram, build_wordpiece, tiny_passages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store


def probe_of(store: Store, *, num_passages: int = 60, query: str = "auto", rows: list[int] | None = None, **options: Any) -> Probe | None:
    chosen = np.arange(len(store.passages)) if rows is None else np.array(rows, dtype=np.int64)
    settings = ProbeSettings(num_passages=num_passages, query=query)
    given = {"seed": 1, "batch_tokens": 200, "tokenizer": store.tokenizer(), "token_types": store.passages.template.has_types} | options
    return Probe.build(store.passages, chosen, settings, **given)


def some_probe(store: Store, **options: Any) -> Probe:
    probe = probe_of(store, **options)
    assert probe is not None
    return probe


def texts_of(probe: Probe, tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[str]]:
    """What the model is given as queries and as passages, special tokens included, padding left out."""
    found: dict[int, str] = {}
    for batch, numbers in probe.batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for number, ids, present in zip(numbers.tolist(), batch["input_ids"], mask, strict=True):
            assert not present[int(present.sum()) :].any()
            found[number] = tokenizer.backend_tokenizer.decode(ids[present].tolist(), skip_special_tokens=False)
    texts = [found[number] for number in range(len(found))]
    return texts[: probe.num_queries], texts[probe.num_queries :]


def words_of(store: Store) -> Callable[[dict[str, Tensor]], Tensor]:
    """Bags of token ids without the special ones."""
    template, count = store.passages.template, len(store.tokenizer())
    special = torch.tensor([*template.single_prefix, *template.single_suffix, template.pad])

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.one_hot(batch["input_ids"], count).sum(1).float().index_fill(1, special, 0.0)

    return encode


def vectors_in_turn(probe: Probe, vectors: np.ndarray) -> Callable[[dict[str, Tensor]], Tensor]:
    """Gives text number n (queries first) the vector n, whatever it says."""
    of_batch = {id(batch): numbers for batch, numbers in probe.batches}
    return lambda batch: torch.from_numpy(vectors[of_batch[id(batch)]])


def hand_made(query_of_p: list[int]) -> Probe:
    """Texts in two batches, the second of one text."""
    of_p = np.array(query_of_p)
    numbers = np.arange(int(of_p.max()) + 1 + len(of_p))[::-1]
    batches = tuple(({"input_ids": torch.zeros(len(part), 3, dtype=torch.int64)}, part) for part in (numbers[:-1], numbers[-1:]))
    return Probe("title", int(of_p.max()) + 1, of_p, batches)


def measured(probe: Probe, vectors: list[list[float]] | np.ndarray) -> dict[str, float]:
    return probe.measures(vectors_in_turn(probe, np.array(vectors, dtype=np.float32)))


def angles(*degrees: float) -> list[list[float]]:
    return [[float(np.cos(np.deg2rad(angle))), float(np.sin(np.deg2rad(angle)))] for angle in degrees]


def test_ranks_by_hand() -> None:
    # Passages at 0, 20 and 90 degrees. Query 0 (at 12) asks for the first: 20 is nearer, rank 2. Query 1 (at 80) for the two others:
    # 90 is the nearest, rank 1.
    found = measured(hand_made([0, 1, 1]), angles(12, 80, 0, 20, 90))
    assert found["probe_RR@10"] == pytest.approx((1 / 2 + 1) / 2)
    # Lengths do not count.
    scaled = np.array(angles(12, 80, 0, 20, 90)) * [[3], [0.1], [1], [50], [2]]
    assert measured(hand_made([0, 1, 1]), scaled)["probe_RR@10"] == pytest.approx(0.75)


def test_collapse_monitors_by_hand() -> None:
    # Passages at 0, 0 and 90 degrees (queries do not count): cosines 1, 0, 0; unit vectors' components 1 1 0 and 0 0 1, standard
    # deviation of each sqrt(2 / 9), times sqrt(2).
    found = measured(hand_made([0, 1, 1]), angles(200, 300, 0, 0, 90))
    assert found["cls_mean_cosine"] == pytest.approx(1 / 3)
    assert found["cls_std"] == pytest.approx(2 / 3)
    spread = measured(hand_made([0, 1, 1, 1]), angles(45, 45, 0, 90, 180, 270))
    assert spread["cls_mean_cosine"] == pytest.approx(-1 / 3)
    assert spread["cls_std"] == pytest.approx(1.0)


def test_ties_count_against() -> None:
    # Both passages at the same distance from each query, and equal to each other: rank 2.
    assert measured(hand_made([0, 1]), angles(0, 0, 30, 30))["probe_RR@10"] == 0.5
    # Also where rounding parts them.
    assert measured(hand_made([0, 1]), angles(0, 0, 30, 30.00001))["probe_RR@10"] == 0.5


def test_nothing_below_rank_ten() -> None:
    def found(num_before: int) -> float:
        degrees = [*np.linspace(1, 20, num_before), 40, 170]
        return measured(hand_made([1] * num_before + [0, 1]), angles(0, 170, *degrees))["probe_RR@10"]

    assert found(9) == pytest.approx((1 / 10 + 1) / 2)
    assert found(10) == pytest.approx((0 + 1) / 2)


def test_a_constant_vector_finds_nothing(tiny_store: Store) -> None:
    probe = some_probe(tiny_store)
    found = probe.measures(lambda batch: torch.full((len(batch["input_ids"]), 4), 0.3, dtype=torch.bfloat16))
    assert found == pytest.approx({"probe_RR@10": 0.0, "probe_whitened_RR@10": 0.0, "cls_mean_cosine": 1.0, "cls_std": 0.0}, abs=1e-6)
    zeros = probe.measures(lambda batch: torch.zeros(len(batch["input_ids"]), 4))
    assert zeros == {"probe_RR@10": 0.0, "probe_whitened_RR@10": 0.0, "cls_mean_cosine": 0.0, "cls_std": 0.0}


def test_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrainingError, match="1 of 5 vectors are not finite"):
        measured(hand_made([0, 1, 1]), [*angles(0, 1, 2, 3), [1.0, float("nan")]])


def test_chance_is_chance() -> None:
    # 200 passages and queries: the mean of 1 / rank up to 10 for random ranks is H(10) / 200 = 0.0146.
    found = measured(hand_made(list(range(200))), np.random.default_rng(0).normal(size=(400, 64)))
    assert found["probe_RR@10"] == pytest.approx(0.0146, abs=0.025)
    assert abs(found["cls_mean_cosine"]) < 0.01 and found["cls_std"] > 0.98


def test_whitening_takes_away_what_all_share() -> None:
    # A query and its passage share a direction of their own, far smaller than what four others hold for all and say of nothing.
    rng = np.random.default_rng(0)
    own = np.concatenate([np.eye(40), np.eye(40)]) * 5
    loud = rng.normal(size=(80, 4)) * 20 + 100
    found = measured(hand_made(list(range(40))), np.concatenate([own, loud], axis=1))
    assert found["probe_RR@10"] < 0.3
    assert found["probe_whitened_RR@10"] > 0.8


def test_whitened_vectors_have_unit_variance_and_no_correlation() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 4)) @ rng.normal(size=(4, 4)) + [1, 2, 3, 4]
    result = whitened(vectors)
    assert result.mean(0) == pytest.approx(np.zeros(4), abs=1e-9)
    assert np.cov(result.T) == pytest.approx(np.eye(4), abs=0.02)


def test_shrinkage_with_fewer_vectors_than_dimensions() -> None:
    # Two vectors at +-(1, 0, 0, 0) around their mean: covariance diag(1, 0, 0, 0), mean variance 1/4, distance 1 - 4/16 = 3/4; each
    # vector's own product is the covariance, error 0, so nothing is mixed in.
    result = whitened(np.array([[3.0, 5, 5, 5], [1.0, 5, 5, 5]]))
    assert np.abs(result) @ np.ones(4) == pytest.approx([1.0, 1.0])
    # Four at +-2 e1 and +-2 e2 in 4 dimensions: covariance diag(2, 2, 0, 0), mean variance 1, distance 8 - 4 = 4, error (16 - 8) / 4 = 2,
    # share 1/2: variances 1.5 1.5 0.5 0.5, so a vector of length 2 gets length 2 / sqrt(1.5).
    cross = np.zeros((4, 4))
    cross[[0, 1, 2, 3], [0, 0, 1, 1]] = [2, -2, 2, -2]
    assert np.linalg.norm(whitened(cross), axis=1) == pytest.approx([2 / 1.5**0.5] * 4)


def test_titles_ask_for_texts_without_them(tiny_store: Store) -> None:
    probe = some_probe(tiny_store)
    # 50 of 60 passages have a title, but the 12 titles are less than half of these: "auto" takes first sentences.
    assert probe.query == "first_sentence"
    probe = some_probe(tiny_store, query="title")
    assert (probe.query, probe.num_queries, probe.num_passages) == ("title", 12, 50)
    queries, passages = texts_of(probe, tiny_store.tokenizer())
    titles = {f"[CLS] {passage['title'].lower()} [SEP]" for passage in tiny_passages() if passage["title"]}
    assert set(queries) == titles
    for number, passage in zip(probe.query_of_P, passages, strict=True):
        words = queries[number].split()[1:-1]
        assert passage.startswith("[CLS] ") and passage.endswith(" [SEP]") and passage.count("[SEP]") == 1
        # Texts about the subject's place name it; no text begins with its title.
        assert not passage.startswith(f"[CLS] {' '.join(words)}")


def test_passages_that_share_a_title_are_all_relevant(tiny_wordpiece: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    passages = [
        {"_id": "1", "title": "Glass Orchard", "text": "one is made of salt"},
        {"_id": "2", "title": "Glass Orchard", "text": "the glass orchard is in the valley"},
        {"_id": "3", "title": "Salt Library", "text": "the salt library is in the desert"},
        {"_id": "4", "title": "Silent Drum", "text": ""},
    ]
    store = build_store(tmp_path / "store", tiny_wordpiece, passages, [], {})
    probe = some_probe(store)
    assert (probe.query, probe.num_queries, probe.num_passages) == ("title", 2, 3)
    assert sorted(np.bincount(probe.query_of_P).tolist()) == [1, 2]
    assert probe.measures(words_of(store))["probe_RR@10"] == 1.0


SUBJECT_WORDS = ["kettle", "beetle", "anchor", "orchard", "violin", "library"]


def sentences(number: int, end: str = ".") -> str:
    first, second = SUBJECT_WORDS[number], SUBJECT_WORDS[(number + 1) % len(SUBJECT_WORDS)]
    return f"The {first} is called {first}{end} A {first} needs {first} and some patience {second}"


@pytest.mark.parametrize("end", [".", "?", "!"])
@pytest.mark.parametrize("family", [build_wordpiece, build_bpe, build_unigram])
def test_first_sentences_find_the_rest_in_every_tokenizer_family(
    family: Callable[[list[str]], PreTrainedTokenizerFast], end: str, tmp_path: Path
) -> None:
    texts = [sentences(number, end) for number in range(6)]
    tokenizer = family(texts)
    passages = [{"_id": str(number), "title": "Title" if number < 2 else "", "text": text} for number, text in enumerate(texts)]
    store = build_store(tmp_path / "store", tokenizer, passages, [], {})
    probe = some_probe(store)
    assert (probe.query, probe.num_queries, probe.num_passages) == ("first_sentence", 6, 6)
    queries, rests = texts_of(probe, tokenizer)
    for query, rest in zip((queries[number] for number in probe.query_of_P), rests, strict=True):
        assert query.replace(" ", "").endswith((f"{end}[SEP]", f"{end}</s>"))
        assert "patience" in rest and "called" not in rest and "itle" not in rest.replace("is", "")
    assert probe.measures(words_of(store))["probe_RR@10"] == 1.0


@pytest.mark.parametrize("mark", ["。", "？", "！"])  # noqa: RUF001
@pytest.mark.parametrize("family", [build_wordpiece, build_bpe, build_unigram])
def test_sentences_of_scripts_without_spaces(family: Callable[[list[str]], PreTrainedTokenizerFast], mark: str, tmp_path: Path) -> None:
    texts = [f"山川森海空{character}{mark}{character}東西南北上下" for character in "花鳥風月"] + [f"山川{mark}東西南北上下"]
    # From single characters, so that each is a token and none has a space before it; "?" and "!" are what the unigram normaliser makes.
    tokenizer = family([*"".join(texts), "?", "!"])
    store = build_store(tmp_path / "store", tokenizer, [{"_id": str(i), "text": text} for i, text in enumerate(texts)], [], {})
    probe = some_probe(store, batch_tokens=64)
    # The last text's first sentence has three tokens.
    assert probe.num_passages == 4
    queries, rests = texts_of(probe, tokenizer)
    marks = (f"{mark}[SEP]", f"{mark}</s>", f"{unicodedata.normalize('NFKC', mark)}</s>")
    assert all(query.replace(" ", "").endswith(marks) for query in queries)
    assert all("東" in rest and "山" not in rest for rest in rests)


def test_ends_that_come_too_early_or_too_late(tmp_path: Path) -> None:
    texts = [
        "Mr. Kettle is called a kettle. He needs river water",  # "Mr." has two tokens; the next end counts
        "The beetle is called a beetle. Yes",  # one token is left
        "the anchor has no end at all and goes on",
        "The drum is called .drum and wakes nobody. It needs felt and wood",
        "",
    ]
    tokenizer = build_wordpiece(texts)
    store = build_store(tmp_path / "store", tokenizer, [{"_id": str(i), "text": text} for i, text in enumerate(texts)], [], {})
    queries, rests = texts_of(some_probe(store), tokenizer)
    assert sorted(queries) == ["[CLS] mr. kettle is called a kettle. [SEP]", "[CLS] the drum is called. [SEP]"]
    assert sorted(rests) == ["[CLS] drum and wakes nobody. it needs felt and wood [SEP]", "[CLS] he needs river water [SEP]"]


def test_nothing_to_tell_apart(tiny_store: Store, tmp_path: Path) -> None:
    assert probe_of(tiny_store, num_passages=0) is None
    assert probe_of(tiny_store, rows=[]) is None
    assert probe_of(tiny_store, num_passages=1, query="title") is None
    # Rows 0 to 4 are of one subject: two passages, one title.
    assert probe_of(tiny_store, rows=[0, 1], query="title") is None
    assert some_probe(tiny_store, rows=[0, 6], query="title").num_queries == 2
    # Rows 5, 11, ... have no title.
    assert probe_of(tiny_store, rows=[5, 11, 17], query="title") is None
    passages = [{"_id": str(number), "text": "no end here at all and nothing else"} for number in range(4)]
    assert probe_of(build_store(tmp_path / "store", tiny_store.tokenizer(), passages, [], {})) is None


def test_the_sample_is_of_the_held_out_rows_and_decided_by_the_seed(tiny_store: Store) -> None:
    rows = [row for row in range(60) if row % 6 != 5 and row % 2]

    def texts(seed: int, given: list[int]) -> tuple[list[str], list[str]]:
        return texts_of(some_probe(tiny_store, num_passages=8, query="title", rows=given, seed=seed), tiny_store.tokenizer())

    queries, passages = texts(1, rows)
    assert len(passages) == 8
    assert texts(1, rows[::-1]) == (queries, passages)
    assert texts(2, rows)[1] != passages
    allowed = {
        " ".join(tiny_store.tokenizer().backend_tokenizer.decode(tiny_store.passages.tokens_of(row)[1].tolist()).split()) for row in rows
    }
    assert {passage.removeprefix("[CLS] ").removesuffix(" [SEP]") for passage in passages} <= allowed


def test_unusable_passages_are_replaced(tiny_store: Store) -> None:
    # 60 rows, 50 with titles: as many as are asked for, not what is left of a sample.
    assert some_probe(tiny_store, num_passages=50, query="title").num_passages == 50


def test_batches_are_bounded_and_as_the_model_takes_them(tiny_store: Store, tmp_path: Path) -> None:
    probe = some_probe(tiny_store, query="title", batch_tokens=100)
    for batch, _ in probe.batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        assert ids.dtype == torch.int64 and ids.numel() <= 100
        assert (batch["token_type_ids"] == 0).all() and batch["token_type_ids"].shape == ids.shape
        assert (ids[:, 0] == tiny_store.tokenizer().cls_token_id).all()
        padded = (ids == tiny_store.tokenizer().pad_token_id).any()
        assert padded == (mask is not None)
        if mask is not None:
            assert ((ids == tiny_store.tokenizer().pad_token_id) == (mask == 0)).all()
    assert any("attention_mask" in batch for batch, _ in probe.batches)
    assert any("attention_mask" not in batch for batch, _ in probe.batches)
    assert len(np.unique(np.concatenate([numbers for _, numbers in probe.batches]))) == 62
    assert not any("token_type_ids" in batch for batch, _ in some_probe(tiny_store, token_types=False).batches)
    # Cut to what a passage may have.
    short = build_store(tmp_path / "store", tiny_store.tokenizer(), tiny_passages(), [], {}, max_passage_tokens=8)
    assert max(batch["input_ids"].shape[1] for batch, _ in some_probe(short, query="title").batches) == 8


def test_the_same_on_every_run_and_in_any_batches(tiny_store: Store) -> None:
    encode = words_of(tiny_store)
    found = some_probe(tiny_store, query="title").measures(encode)
    assert some_probe(tiny_store, query="title").measures(encode) == found
    assert some_probe(tiny_store, query="title", batch_tokens=5000).measures(encode) == pytest.approx(found)
    assert 0.05 < found["probe_RR@10"] < 1.0
    with torch.autocast("cpu", torch.bfloat16):
        assert some_probe(tiny_store, query="title").measures(encode) == found
