"""Pseudo queries: what a passage itself offers as a query for it, so that a retriever can be trained without labels.

Kinds (KINDS), each drawn from one passage by (seed, passage id, kind, number) alone:
    title            the title; relevant are all passages that share it, where they are few
    title_keywords   the title and a few of the passage's heaviest words: a thing and one side of it
    first_sentence   the first sentence, cut to a length drawn (inverse cloze and body-first selection, arXiv 1906.00300, 2002.03932)
    crop             a run of words from anywhere (independent cropping, arXiv 2112.09118)
    keywords         the heaviest words in the order of the text: what is typed into a search box
    cloze            a sentence without one of its heavy words, a question word in front (arXiv 1906.04980, "identity" translation; English)

The passage keeps the words that the query took, as a real passage has the words of a real query, but a verbatim run of words is found
by word overlap alone: `drop_words` leaves some of them out at random, and the consistency filter can limit the queries that BM25 finds
without effort (ConsistencySettings.trivial_share).
Words are runs between white space; where a script has none (Chinese, Japanese, Thai) a crop counts characters and keywords are the
analyzer's terms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simlm.data.store import Ints, Table, hash_bytes

KINDS = ("title", "title_keywords", "first_sentence", "crop", "keywords", "cloze")

ONE_A_PASSAGE = frozenset({"title", "first_sentence"})
"""Kinds of which a passage has one query, whatever is drawn."""

Weigh = Callable[[str], Sequence[tuple[str, float]]]
"""Text -> (word, weight) of each word that counts, in order; weights are BM25's, 0 for a word of no interest."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[^\Wa-z_])|(?<=[\u3002\uff01\uff1f])|\n\s*\n")
_SPACE = re.compile(r"\s+")
_EDGES = " .,;:!?\"'()[]"
_UNSPACED_WORD = 12
"""Mean characters of a "word" above which the text is taken to have no spaces between words."""
_CHARACTERS_A_WORD = 2
"""Of unspaced text: a crop of n words is 2 n characters, as most Chinese and Japanese words have two."""
_HEAVY_POOL = 2
"""Keywords are drawn among the heaviest 2 n words, so that two queries of one passage differ."""


@dataclass(frozen=True)
class Lengths:
    """Limits in words. shortest, longest: of crops, sentences, clozes; keywords: of keyword queries; title_keywords: beside the title."""

    shortest: int
    longest: int
    keywords: tuple[int, int]
    title_keywords: tuple[int, int]


@dataclass(frozen=True)
class PseudoQuery:
    """A query with the passages that it was made from. query_id: KIND/NUMBER/PASSAGE ID; passage_rows: ascending."""

    query_id: str
    kind: str
    text: str
    passage_rows: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A passage as queries are made from it. name: its id, of which all draws are a function."""

    name: str
    title: str
    text: str


class Drawing:
    """Pseudo queries of a corpus: passages in an order drawn for each kind, and the query that each of them gives.

    per_passage: queries of one kind that a passage gives at most, second ones after all first ones. max_positives: of a title.
    """

    def __init__(
        self,
        passages: Table,
        *,
        seed: int,
        lengths: Lengths,
        drop_words: float,
        weigh: Weigh,
        per_passage: int,
        max_positives: int,
    ) -> None:
        self.passages, self.seed = passages, seed
        self.lengths, self.drop_words, self.weigh = lengths, drop_words, weigh
        self.per_passage, self.max_positives = per_passage, max_positives

    def draw(self, shares: Mapping[str, float], num_queries: int) -> list[PseudoQuery]:
        """At most `num_queries` queries of the kinds, by their shares; what one kind has too little of, the others make up for."""
        streams = {kind: self.stream(kind) for kind in shares}
        found: dict[str, list[PseudoQuery]] = {kind: [] for kind in shares}
        while streams and (missing := num_queries - sum(map(len, found.values()))) > 0:
            wanted = allot({kind: shares[kind] for kind in streams}, missing)
            for kind, count in wanted.items():
                before = len(found[kind])
                found[kind] += [query for _, query in zip(range(count), streams[kind], strict=False)]
                if len(found[kind]) - before < count:
                    del streams[kind]
        return [query for queries in found.values() for query in queries]

    def stream(self, kind: str) -> Iterator[PseudoQuery]:
        """All queries of a kind, in the order drawn."""
        titles = _Titles(self.passages) if kind == "title" else None
        for number, row in self.places(kind):
            rows = titles.sharing(row) if titles is not None else (row,)
            if len(rows) > self.max_positives or (titles is not None and not titles.is_new(row)):
                continue
            name = self.passages.ids[row]
            source = Source(name, self.passages.title(row), self.passages.text(row))
            text = make_query(kind, source, number, seed=self.seed, lengths=self.lengths, drop_words=self.drop_words, weigh=self.weigh)
            if text is not None:
                yield PseudoQuery(f"{kind}/{number}/{name}", kind, text, rows)

    def places(self, kind: str) -> Iterator[tuple[int, int]]:
        """(number, passage row): every passage once in an order drawn for the kind, then again, `per_passage` times in all."""
        hashes = [hash_bytes(f"{kind}/{name}".encode(), self.seed) for name in self.passages.ids]
        order: NDArray[np.int64] = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        for number in range(1 if kind in ONE_A_PASSAGE else self.per_passage):
            for row in order:
                yield number, int(row)


def united(queries: Sequence[PseudoQuery], max_positives: int) -> tuple[list[PseudoQuery], int]:
    """Queries of one text (case apart) as one with all their passages, in the order of the first; and how many were left out because
    more than `max_positives` passages give them."""
    first: dict[str, PseudoQuery] = {}
    rows: dict[str, set[int]] = {}
    for query in queries:
        key = " ".join(query.text.casefold().split())
        first.setdefault(key, query)
        rows.setdefault(key, set()).update(query.passage_rows)
    kept = [PseudoQuery(query.query_id, query.kind, query.text, tuple(sorted(rows[key]))) for key, query in first.items()]
    chosen = [query for query in kept if len(query.passage_rows) <= max_positives]
    return chosen, len(kept) - len(chosen)


def parted(queries: Sequence[PseudoQuery], is_dev: Callable[[int], bool]) -> tuple[list[PseudoQuery], list[PseudoQuery], int]:
    """(train, dev, left out): by passage, so that no passage is asked for in both; a query with passages on both sides is left out."""
    sides = [{is_dev(row) for row in query.passage_rows} for query in queries]
    train = [query for query, side in zip(queries, sides, strict=True) if side == {False}]
    dev = [query for query, side in zip(queries, sides, strict=True) if side == {True}]
    return train, dev, len(queries) - len(train) - len(dev)


def counts_of(queries: Sequence[PseudoQuery]) -> dict[str, int]:
    """Kind -> number of queries."""
    return dict(sorted(Counter(query.kind for query in queries).items()))


class _Titles:
    """Which passages share a title, told by 64-bit hashes of the titles as words (8 bytes a passage)."""

    def __init__(self, passages: Table) -> None:
        self._hashes = np.array(
            [hash_bytes(readable(passages.title(row)).casefold().encode()) for row in range(len(passages))], dtype=np.uint64
        )
        self._order: Ints = np.argsort(self._hashes, kind="stable")
        self._sorted = self._hashes[self._order]
        self._given: set[int] = set()

    def sharing(self, row: int) -> tuple[int, ...]:
        """Rows with the title of `row`, ascending."""
        own = self._hashes[row]
        start, stop = (int(np.searchsorted(self._sorted, own, side=side)) for side in ("left", "right"))
        return tuple(int(other) for other in self._order[start:stop])

    def is_new(self, row: int) -> bool:
        """Whether this is asked for the first time of a title."""
        own = int(self._hashes[row])
        known = own in self._given
        self._given.add(own)
        return not known


def make_query(kind: str, source: Source, number: int, *, seed: int, lengths: Lengths, drop_words: float, weigh: Weigh) -> str | None:
    """The query of a kind that the passage gives, None where it has none of it (no title, too few words).

    number: 0, 1 ... of the passage's queries of this kind; another number, another draw. drop_words: share of the words of crops and
    sentences left out at random, never below `lengths.shortest`.
    """
    rng = np.random.default_rng(hash_bytes(f"{kind}/{number}/{source.name}".encode(), seed))
    title = readable(source.title)
    if kind == "title":
        return title if number == 0 and title else None
    if kind == "title_keywords":
        words = _heaviest(source.text, rng, lengths.title_keywords, weigh, without=frozenset(_folded(title))) if title else []
        return " ".join([title, *words]) if words else None
    if kind == "keywords":
        words = _heaviest(source.text, rng, lengths.keywords, weigh)
        return " ".join(words) if len(words) >= lengths.keywords[0] else None
    if kind == "first_sentence":
        first = sentences(source.text)[0] if number == 0 and source.text.strip() else ""
        return _span(first, rng, lengths, drop_words, start=0)
    if kind == "crop":
        return _span(source.text, rng, lengths, drop_words)
    assert kind == "cloze", kind
    return _cloze(source.text, rng, lengths, weigh)


def readable(title: str) -> str:
    """A title as words: underscores are spaces (Wikipedia's file names), white space is one space."""
    return _SPACE.sub(" ", title.replace("_", " ")).strip()


def sentences(text: str) -> list[str]:
    """Sentences of a text: they end at . ! ? before a capital, a digit or a quote, at their wide forms, at empty lines. At least one."""
    parts = [_SPACE.sub(" ", part).strip() for part in _SENTENCE_END.split(text)]
    return [part for part in parts if part] or [_SPACE.sub(" ", text).strip()]


def allot(shares: Mapping[str, float], limit: int) -> dict[str, int]:
    """How many queries of each kind make `limit` in all: by share, the rest to the largest fractions (ties: the order of the mapping)."""
    total = sum(shares.values())
    exact = {kind: limit * share / total for kind, share in shares.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_fraction = sorted(exact, key=lambda kind: -(exact[kind] - counts[kind]))
    for kind in by_fraction[: limit - sum(counts.values())]:
        counts[kind] += 1
    return counts


def words_of(text: str) -> list[str]:
    """Runs between white space; single characters where the text has no spaces between words."""
    words = text.split()
    if words and sum(map(len, words)) / len(words) > _UNSPACED_WORD and not text.isascii():
        return list("".join(words))
    return words


def _span(text: str, rng: np.random.Generator, lengths: Lengths, drop_words: float, start: int | None = None) -> str | None:
    """Words start .. start + a length drawn; `start` is drawn too where it is None. None for a text shorter than the shortest."""
    words = words_of(text)
    spaced = len(words) == len(text.split())
    unit = 1 if spaced else _CHARACTERS_A_WORD
    if len(words) < lengths.shortest * unit:
        return None
    count = min(int(rng.integers(lengths.shortest, lengths.longest + 1)) * unit, len(words))
    if start is None:
        start = int(rng.integers(len(words) - count + 1))
    chosen = words[start : start + count]
    if not spaced:
        return "".join(chosen)
    most = min(int(rng.binomial(count, drop_words)), count - lengths.shortest)
    dropped = set(rng.permutation(count)[:most].tolist())
    return " ".join(word for place, word in enumerate(chosen) if place not in dropped).strip(_EDGES)


def _heaviest(
    text: str, rng: np.random.Generator, between: tuple[int, int], weigh: Weigh, without: frozenset[str] = frozenset()
) -> list[str]:
    """Words drawn among the heaviest, each once, in the order of their first place; fewer than asked for where the text has fewer."""
    weight: dict[str, float] = {}
    shown: dict[str, str] = {}
    for word, value in weigh(text):
        folded = word.casefold()
        if value > 0 and folded not in without:
            weight[folded] = max(value, weight.get(folded, 0.0))
            shown.setdefault(folded, word)
    count = int(rng.integers(between[0], between[1] + 1))
    heavy = sorted(weight, key=lambda word: (-weight[word], word))[: _HEAVY_POOL * count]
    kept = set(np.array(heavy)[rng.permutation(len(heavy))[:count]].tolist()) if heavy else set()
    return [shown[word] for word in weight if word in kept]


_NUMBER = re.compile(r"\d")


def _cloze(text: str, rng: np.random.Generator, lengths: Lengths, weigh: Weigh) -> str | None:
    """ "what", "who", "when" or "how many", then the sentence around a heavy word, which is left out."""
    usable = [sentence for sentence in sentences(text) if len(sentence.split()) > lengths.shortest]
    if not usable:
        return None
    sentence = usable[int(rng.integers(len(usable)))]
    words = sentence.split()
    weight = {word.casefold(): value for word, value in weigh(sentence)}
    values = [max((weight.get(part, 0.0) for part in re.findall(r"\w+", word.casefold())), default=0.0) for word in words]
    heavy = [place for place in np.argsort(-np.array(values), kind="stable")[:3].tolist() if values[place] > 0]
    if not heavy:
        return None
    place = int(heavy[int(rng.integers(len(heavy)))])
    answer = words[place].strip("\"'()[]")
    count = min(int(rng.integers(lengths.shortest, lengths.longest + 1)), len(words) - 1)
    # The words nearest to the gap, as many before as after where there are.
    begin = min(max(place - count // 2, 0), len(words) - count - 1)
    context = [word for at, word in enumerate(words[begin : begin + count + 1], start=begin) if at != place]
    asked = ("when" if re.fullmatch(r"(1\d|20)\d\d\W*", answer) else "how many") if _NUMBER.search(answer) else ""
    asked = asked or ("who" if answer[:1].isupper() and place > 0 else "what")
    return " ".join([asked, *context]).strip(_EDGES)


def _folded(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
