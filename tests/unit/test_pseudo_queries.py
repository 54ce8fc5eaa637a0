"""Pseudo queries: what each kind takes of a passage, by hand; what is drawn depends on (seed, passage) alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from simlm.data.pseudo_queries import (
    KINDS,
    Drawing,
    Lengths,
    PseudoQuery,
    Source,
    allot,
    counts_of,
    make_query,
    parted,
    readable,
    sentences,
    united,
)
from simlm.recipe import PSEUDO_QUERY_KINDS
from tests.conftest import build_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

LENGTHS = Lengths(shortest=3, longest=5, keywords=(2, 2), title_keywords=(1, 1))
TEXT = "The copper violin plays only in rain. It was built in 1742 near Belwick! Who repairs it?"
SOURCE = Source("p1", "Copper_violin", TEXT)


def weigh(text: str) -> Sequence[tuple[str, float]]:
    """A word weighs as much as it has letters, short ones nothing."""
    return [(word, float(len(word)) if len(word) > 3 else 0.0) for word in re.findall(r"\w+", text)]


def query(
    kind: str, source: Source = SOURCE, number: int = 0, *, seed: int = 0, lengths: Lengths = LENGTHS, drop: float = 0.0
) -> str | None:
    return make_query(kind, source, number, seed=seed, lengths=lengths, drop_words=drop, weigh=weigh)


def test_the_recipe_knows_the_kinds() -> None:
    assert PSEUDO_QUERY_KINDS == KINDS


def test_title() -> None:
    assert query("title") == "Copper violin"
    assert query("title", number=1) is None
    assert query("title", Source("p", "", TEXT)) is None
    assert readable("  Super_Bowl\t50 ") == "Super Bowl 50"


def test_sentences_end_where_the_next_one_begins() -> None:
    assert sentences(TEXT) == ["The copper violin plays only in rain.", "It was built in 1742 near Belwick!", "Who repairs it?"]
    assert sentences("It costs 3.50 e.g. in winter. 7 of them do") == ["It costs 3.50 e.g. in winter.", "7 of them do"]
    assert sentences("Heading\n\nThe text\nof two lines.") == ["Heading", "The text of two lines."]
    assert sentences("\u4ed6\u6765\u4e86\u3002\u5979\u8d70\u4e86\u3002") == ["\u4ed6\u6765\u4e86\u3002", "\u5979\u8d70\u4e86\u3002"]
    assert sentences("") == [""]


def test_first_sentence_is_its_beginning() -> None:
    found = query("first_sentence")
    assert found is not None
    assert "The copper violin plays only in rain.".startswith(found)
    assert 3 <= len(found.split()) <= 5
    assert query("first_sentence", Source("p", "", "Too short. But a long second sentence follows here.")) is None


def test_crop_is_a_run_of_words_and_another_number_another_one() -> None:
    found = [query("crop", number=number) for number in range(8)]
    assert all(part is not None and part in TEXT and 3 <= len(part.split()) <= 5 for part in found)
    assert len(set(found)) > 3
    assert query("crop", Source("p", "", "two words")) is None


def test_dropped_words_keep_the_order_and_the_shortest_length() -> None:
    lengths = Lengths(shortest=3, longest=12, keywords=(2, 2), title_keywords=(1, 1))
    found = [query("crop", number=number, lengths=lengths, drop=0.9) for number in range(20)]
    for part in found:
        assert part is not None
        words, rest = re.findall(r"\w+", part), iter(re.findall(r"\w+", TEXT))
        assert len(words) >= 3
        assert all(word in rest for word in words), part
    assert any(part not in TEXT for part in found if part is not None)


def test_keywords_are_heavy_and_in_the_order_of_the_text() -> None:
    # The heaviest four are copper, violin, repairs, Belwick; two of them are drawn.
    order = ["copper", "violin", "Belwick", "repairs"]
    for number in range(6):
        words = (query("keywords", number=number) or "").split()
        assert len(words) == 2
        assert [order.index(word) for word in words] == sorted(order.index(word) for word in words)
    assert query("keywords", Source("p", "", "a bee is by an elm")) is None
    assert query("keywords", Source("p", "", "rain Rain RAIN rain snow")) == "rain snow"


def test_title_keywords_add_what_the_title_does_not_say() -> None:
    for number in range(6):
        found = query("title_keywords", number=number)
        assert found in {"Copper violin repairs", "Copper violin Belwick"}
    assert query("title_keywords", Source("p", "", TEXT)) is None
    assert query("title_keywords", Source("p", "Copper violin", "the copper violin")) is None


def test_cloze_asks_for_a_heavy_word() -> None:
    source = Source("p", "", "It was made by Belwickers long ago.")
    lengths = Lengths(shortest=3, longest=3, keywords=(2, 2), title_keywords=(1, 1))
    found = {query("cloze", source, number, lengths=lengths) for number in range(12)}
    # Heavy: Belwickers, made, long; a capital inside a sentence is asked for by "who".
    assert found == {"who by long ago", "what was by Belwickers", "what by Belwickers ago"}
    dated = {query("cloze", Source("p", "", "It ended there in 1742."), number, lengths=lengths) for number in range(12)}
    assert dated == {"what It there in", "what ended in 1742", "when ended there in"}
    assert query("cloze", Source("p", "", "a b c d e f g")) is None


def test_scripts_without_spaces_are_cut_by_characters() -> None:
    text = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427"
    found = query("crop", Source("p", "", text))
    assert found is not None
    assert found in text
    assert 6 <= len(found) <= 10


def test_a_query_is_a_function_of_seed_and_passage() -> None:
    for kind in ("crop", "keywords", "cloze"):
        # The place of the passage in the corpus is not asked for at all; another seed or id draws anew.
        assert query(kind) == query(kind)
        others = {query(kind, Source(f"p{number}", SOURCE.title, TEXT), seed=seed) for number in range(5) for seed in range(3)}
        assert len(others) > 1


def test_allot_by_largest_fraction() -> None:
    assert allot({"a": 1.0, "b": 1.0, "c": 0.5}, 10) == {"a": 4, "b": 4, "c": 2}
    assert allot({"a": 1.0, "b": 1.0, "c": 1.0}, 10) == {"a": 4, "b": 3, "c": 3}
    assert allot({"a": 3.0}, 0) == {"a": 0}


def made(kind: str, text: str, *rows: int) -> PseudoQuery:
    return PseudoQuery(f"{kind}/0/p{rows[0]}", kind, text, rows)


def test_equal_texts_are_one_query_of_all_their_passages() -> None:
    queries = [
        made("crop", "Rain  falls", 4),
        made("keywords", "rain falls", 2),
        made("crop", "snow", 1),
        made("crop", "snow", 2),
        made("crop", "snow", 3),
    ]
    kept, num_ambiguous = united(queries, max_positives=2)
    assert kept == [PseudoQuery("crop/0/p4", "crop", "Rain  falls", (2, 4))]
    assert num_ambiguous == 1


def test_no_passage_is_asked_for_in_train_and_in_dev() -> None:
    queries = [made("crop", "a", 1), made("crop", "b", 2), made("title", "c", 1, 2)]
    train, dev, left_out = parted(queries, lambda row: row == 2)
    assert (train, dev, left_out) == ([queries[0]], [queries[1]], 1)
    assert counts_of(queries) == {"crop": 2, "title": 1}


# --- a corpus


PASSAGES = [
    {"_id": "a", "title": "Shared", "text": "one two three four five six seven"},
    {"_id": "b", "title": "shared", "text": "eight nine ten eleven twelve"},
    {"_id": "c", "title": "Own_title", "text": "a b c d e f"},
    {"_id": "d", "title": "", "text": "no title here but words"},
    {"_id": "e", "title": "Much", "text": "p q r s"},
    {"_id": "f", "title": "Much", "text": "t u v w"},
    {"_id": "g", "title": "Much", "text": "x y z z"},
]


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    return build_store(tmp_path_factory.mktemp("small") / "store", tiny_wordpiece, PASSAGES, [], {})


def drawing(store: Store, *, seed: int = 0, per_passage: int = 2) -> Drawing:
    return Drawing(store.passages, seed=seed, lengths=LENGTHS, drop_words=0.0, weigh=weigh, per_passage=per_passage, max_positives=2)


def test_a_title_is_asked_for_once_and_all_its_passages_are_relevant(small_store: Store) -> None:
    found = {query.text.casefold(): query.passage_rows for query in drawing(small_store).stream("title")}
    assert found == {"shared": (0, 1), "own title": (2,)}
    assert len(list(drawing(small_store).stream("title"))) == 2


def test_what_a_kind_lacks_the_others_make_up_for(small_store: Store) -> None:
    queries = drawing(small_store).draw({"title": 1.0, "crop": 1.0}, 10)
    assert counts_of(queries) == {"crop": 8, "title": 2}
    # No crop beyond two a passage, whatever is asked for; every passage has had its first before any has its second.
    everything = drawing(small_store).draw({"crop": 1.0}, 1000)
    assert counts_of(everything) == {"crop": 14}
    assert [query.query_id.split("/")[1] for query in everything] == ["0"] * 7 + ["1"] * 7
    assert len({query.query_id for query in everything}) == 14


def test_the_order_is_drawn_by_seed_and_kind(small_store: Store) -> None:
    orders = {tuple(drawing(small_store, seed=seed, per_passage=1).places(kind)) for seed in range(3) for kind in ("crop", "cloze")}
    assert len(orders) > 3
    assert all(sorted(row for _, row in order) == list(range(7)) for order in orders)


def test_a_passage_gives_the_same_query_in_another_corpus(
    tmp_path: Path, small_store: Store, tiny_wordpiece: PreTrainedTokenizerFast
) -> None:
    fewer = build_store(tmp_path / "store", tiny_wordpiece, PASSAGES[:0:-1], [], {})
    texts = {query.query_id: query.text for query in drawing(small_store).stream("crop")}
    for query in drawing(fewer).stream("crop"):
        assert texts[query.query_id] == query.text
