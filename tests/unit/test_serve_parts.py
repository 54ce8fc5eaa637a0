"""Parts of the server by themselves: highlights, filters, block list, lane, tokens and addresses."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simlm.data.store import Store
from simlm.errors import DataError, SimlmError
from simlm.index.lexical import Analyzer
from simlm.serve import block_list, filters, highlights
from simlm.serve.block_list import read_block_list
from simlm.serve.filters import MetadataFilters, value_text
from simlm.serve.highlights import Highlighter, WordTerms
from simlm.serve.lane import Lane, LaneClosedError, LaneFullError
from simlm.serve.launch import bound_socket, is_loopback, read_token
from tests.conftest import build_store, tiny_passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# --- highlights


@pytest.mark.parametrize(
    ("language", "query", "text", "expected"),
    [
        ("english", "running dogs", "The Dog runs; a dog_house.", ["Dog", "runs", "dog"]),
        ("english", "the of", "The cat of the house", []),
        ("english", "", "anything", []),
        ("english", "anything", "", []),
        ("none", "東京都", "私は東京都に住む", ["東京都"]),
        ("none", "한국어", "한국어를 배운다", ["한국어를"]),
        ("german", "Häuser", "Ein Haus, zwei Ha\u0308user", ["Haus", "Ha\u0308user"]),
        ("none", "file", "one \ufb01le \U0001fad6 file", ["\ufb01le", "file"]),
    ],
)
def test_highlights_are_the_words_whose_terms_the_query_has(language: str, query: str, text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in Highlighter(WordTerms(Analyzer(language)), query).spans(text)] == expected


def test_highlights_do_not_overlap() -> None:
    assert Highlighter(WordTerms(Analyzer("none")), "東東").spans("東" * 5000 + " " + "x" * 5000) == [(0, 5000)]


def test_what_was_seen_before_changes_no_highlight() -> None:
    """The words that a term stands for are collected as passages go by: later queries and texts must find them, old and new."""
    terms_of = WordTerms(Analyzer("english"))
    text = "a dog runs, dogs ran; 東京 dog-run"
    for query, expected in (
        ("runs", ["runs", "run"]),
        ("dog", ["dog", "dogs", "dog"]),
        ("running dogs", ["dog", "runs", "dogs", "dog", "run"]),
    ):
        highlighter = Highlighter(terms_of, query)
        assert [text[start:end] for start, end in highlighter.spans(text)] == expected
        # A form of the word that no passage had before.
        assert highlighter.spans("Dogs' " if "dog" in query else "RUNNING ") != []


def test_remembered_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highlights, "REMEMBERED_WORDS", 3)
    terms_of = WordTerms(Analyzer("english"))
    text = "one dog two dogs three dogged four doggy"
    assert [text[start:end] for start, end in Highlighter(terms_of, "dogs").spans(text)] == ["dog", "dogs", "dogged"]
    # Full: the next one starts afresh, and finds the same.
    assert len(terms_of.seen().terms) == 0
    assert [text[start:end] for start, end in Highlighter(terms_of, "dogs").spans(text)] == ["dog", "dogs", "dogged"]


# --- filters


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    passages: list[dict[str, Any]] = tiny_passages()[:6]
    given: list[dict[str, Any]] = [
        {"year": 2019, "kind": "a"},
        {"year": 2020, "kind": "a", "open": True},
        {"year": "2019", "kind": "b", "open": False},
        {"year": 2019.0},
        {"kind": "c", "score": 2.5},
        {},
    ]
    return build_store(
        tmp_path_factory.mktemp("filters") / "store",
        tiny_wordpiece,
        [passage | {"metadata": metadata} for passage, metadata in zip(passages, given, strict=True)],
        [],
        {},
    )


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"year": 2019}, [0, 2, 3]),
        ({"year": "2019"}, [0, 2, 3]),
        ({"kind": ["a", "b"]}, [0, 1, 2]),
        ({"kind": "a", "year": 2020}, [1]),
        ({"open": True}, [1]),
        ({"open": "false"}, [2]),
        ({"score": 2.5}, [4]),
        ({"kind": "nothing has this"}, []),
    ],
)
def test_a_filter_keeps_the_passages_that_have_one_of_its_values_in_every_field(store: Store, wanted: Any, rows: list[int]) -> None:
    mask = MetadataFilters(store.passages).mask(wanted)
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == rows


def test_no_filter_and_nothing_blocked_is_no_mask(store: Store) -> None:
    assert MetadataFilters(store.passages).mask({}) is None


def test_a_filter_never_lets_a_blocked_passage_through(store: Store) -> None:
    blocked = np.array([True, False, False, False, False, True])
    masks = MetadataFilters(store.passages, blocked)
    everything, some = masks.mask({}), masks.mask({"year": 2019})
    assert everything is not None
    assert some is not None
    assert np.flatnonzero(everything).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(some).tolist() == [2, 3]
    assert masks.mask({"year": ["2019"]}) is some  # kept, and the same array for the same wish


def test_an_unknown_field_names_those_there_are(store: Store) -> None:
    with pytest.raises(
        DataError, match=r"filters\.yeer: no passage has this field; did you mean 'year'\? \(fields: year, kind, open, score\)"
    ):
        MetadataFilters(store.passages).mask({"yeer": 2019})


def test_choices_are_the_most_frequent_values_as_text(store: Store) -> None:
    everything = np.ones(6, dtype=bool)
    choices = MetadataFilters(store.passages).choices(everything)
    assert choices == {"year": ["2019", "2020"], "kind": ["a", "b", "c"], "open": ["false", "true"], "score": ["2.5"]}
    assert MetadataFilters(store.passages).choices(~everything)["kind"] == []


def test_a_field_with_too_many_values_cannot_be_filtered_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MOST_VALUES", 2)
    masks = MetadataFilters(store.passages)
    assert set(masks.choices(np.ones(6, dtype=bool))) == {"year", "open", "score"}
    with pytest.raises(DataError, match="kind: has more than 2 different values"):
        masks.mask({"kind": "a"})


def test_kept_masks_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MASK_BYTES", 12)
    masks = MetadataFilters(store.passages)
    first = masks.mask({"year": 2019})
    for kind in "abcd":
        masks.mask({"kind": kind})
    assert masks.mask({"year": 2019}) is not first
    assert len(masks._masks) == 2


def test_values_are_compared_as_they_are_written() -> None:
    assert [value_text(value) for value in (True, False, 3, 3.0, 2.5, "x")] == ["true", "false", "3", "3", "2.5", "x"]


# --- block list


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def test_a_block_list_names_passages_by_id_and_by_rule(store: Store, tmp_path: Path) -> None:
    file = lines(
        tmp_path / "blocked",
        "# harmful",
        "granite-kettle/where",
        "",
        {"id": "nobody"},
        {"regex": "(?i)TWELVE years"},
        {"field": "kind", "equals": "c"},
        {"field": "year", "equals": 2020},
    )
    blocked, unknown = read_block_list(file).mask(store.passages)
    # Rows 1 (its text, and its year), 0 (its id), 4 (its kind).
    assert np.flatnonzero(blocked).tolist() == [0, 1, 4]
    assert unknown == ["nobody"]


def test_a_byte_order_mark_hides_no_entry(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text('{"regex": "."}\nfine\n', encoding="utf-8-sig")
    found = read_block_list(tmp_path / "blocked")
    assert (list(found.ids), len(found.patterns)) == (["fine"], 1)


def test_an_empty_block_list_blocks_nothing(store: Store, tmp_path: Path) -> None:
    blocked, unknown = read_block_list(lines(tmp_path / "blocked")).mask(store.passages)
    assert (blocked.any(), unknown) == (False, [])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"regex": ', "not a JSON object"),
        ({"regex": "(" * 3}, "not a regular expression"),
        ({"regex": "a" * 1001}, "1,001 characters"),
        ({"regexp": "a"}, "unknown rule"),
        ({"field": "x"}, "unknown rule"),
        ({"field": "x", "equals": None}, "unknown rule"),
        ("{" * 100_000, "not a JSON object"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named_by_its_line(tmp_path: Path, entry: Any, message: str) -> None:
    file = lines(tmp_path / "blocked", "fine", entry)
    with pytest.raises(DataError, match=f"blocked:2: .*{message}"):
        read_block_list(file)


def test_a_pattern_that_backtracks_without_end_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_list, "SECONDS_A_PASSAGE", 0.05)
    file = lines(tmp_path / "blocked", {"regex": r"(?:(?:\w|[a-z ]|[e-o])+ ?)+[0-9]"})
    with pytest.raises(DataError, match=r"blocked:1: the regular expression takes over 0\.05 s on passage 'granite-kettle/where'"):
        read_block_list(file).mask(store.passages)


def test_a_block_list_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_block_list(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_block_list(tmp_path / "latin")


# --- lane


def test_tasks_that_wait_go_together_and_get_their_own_results() -> None:
    batches: list[list[int]] = []
    go = threading.Event()

    def work(tasks: list[int]) -> list[int]:
        go.wait(10)
        batches.append(tasks)
        return [task * 10 for task in tasks]

    lane: Lane[int, int] = Lane("test", work, most_waiting=10, most_together=3)
    first = lane.submit(0)
    while len(lane):
        time.sleep(0.001)
    others = [lane.submit(number) for number in range(1, 6)]
    go.set()
    assert [future.result(10) for future in (first, *others)] == [0, 10, 20, 30, 40, 50]
    assert batches == [[0], [1, 2, 3], [4, 5]]
    lane.close()


def test_a_full_lane_refuses_and_says_when_to_come_back() -> None:
    go = threading.Event()

    def work(tasks: list[int]) -> list[int]:
        go.wait(10)
        return tasks

    lane: Lane[int, int] = Lane("test", work, most_waiting=2, most_together=1)
    accepted = [lane.submit(0)]
    while len(lane):
        time.sleep(0.001)
    accepted += [lane.submit(1), lane.submit(2)]
    with pytest.raises(LaneFullError) as refusal:
        lane.submit(3)
    assert refusal.value.retry_seconds >= 1
    go.set()
    assert [future.result(10) for future in accepted] == [0, 1, 2]
    lane.close()


def test_several_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=10)

    def work(tasks: list[int]) -> list[int]:
        together.wait()
        return tasks

    lane: Lane[int, int] = Lane("test", work, most_waiting=10, most_together=1, threads=2)
    futures = [lane.submit(number) for number in range(4)]
    assert [future.result(10) for future in futures] == [0, 1, 2, 3]
    lane.close()


def test_every_thread_of_a_lane_is_set_up_before_it_works() -> None:
    set_up: list[str] = []
    lane: Lane[int, bool] = Lane(
        "test",
        lambda tasks: [threading.current_thread().name in set_up] * len(tasks),
        most_waiting=9,
        most_together=1,
        threads=3,
        on_start=lambda: set_up.append(threading.current_thread().name),
    )
    assert all(future.result(30) for future in [lane.submit(number) for number in range(9)])
    lane.close()
    assert len(set_up) == 3


def test_closing_finishes_what_was_accepted_and_takes_nothing_more() -> None:
    def work(tasks: list[int]) -> list[int]:
        time.sleep(0.02)
        return tasks

    lane: Lane[int, int] = Lane("test", work, most_waiting=10, most_together=1)
    futures = [lane.submit(number) for number in range(5)]
    lane.close()
    assert [future.result(0) for future in futures] == [0, 1, 2, 3, 4]
    with pytest.raises(LaneClosedError):
        lane.submit(5)


def test_one_bad_task_does_not_take_its_batch_with_it() -> None:
    go = threading.Event()

    def work(tasks: list[int]) -> list[int]:
        go.wait(10)
        return [100 // task for task in tasks]

    lane: Lane[int, int] = Lane("test", work, most_waiting=10, most_together=5)
    first = lane.submit(1)
    while len(lane):
        time.sleep(0.001)
    futures = [lane.submit(task) for task in (2, 0, 5)]
    go.set()
    assert (first.result(10), futures[0].result(10), futures[2].result(10)) == (100, 50, 20)
    with pytest.raises(ZeroDivisionError):
        futures[1].result(10)
    assert lane.submit(4).result(10) == 25
    lane.close()


def test_a_cancelled_task_is_not_done() -> None:
    done: list[int] = []
    go = threading.Event()

    def work(tasks: list[int]) -> list[int]:
        go.wait(10)
        done.extend(tasks)
        return tasks

    lane: Lane[int, int] = Lane("test", work, most_waiting=10, most_together=1)
    lane.submit(0)
    while len(lane):
        time.sleep(0.001)
    assert lane.submit(1).cancel()
    last = lane.submit(2)
    go.set()
    last.result(10)
    lane.close()
    assert done == [0, 2]


def test_a_lane_that_waits_holds_no_task() -> None:
    """An old run must go when its last request is answered, not when the next one comes."""
    import gc
    import weakref

    class Task:
        pass

    lane: Lane[Any, None] = Lane("test", lambda tasks: [None] * len(tasks), most_waiting=2, most_together=1)
    task = Task()
    watched = weakref.ref(task)
    lane.submit(task).result(10)
    del task
    deadline = time.monotonic() + 10
    while watched() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert watched() is None
    lane.close()


# --- tokens and addresses


def test_the_token_comes_from_the_file_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("of-the-file\n", encoding="utf-8")
    monkeypatch.delenv("SIMLM_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("SIMLM_TOKEN", "of-the-environment")
    assert read_token(None) == "of-the-environment"
    assert read_token(tmp_path / "token") == "of-the-file"


@pytest.mark.parametrize("content", ["", " \n", "two words", "umläut"])
def test_what_holds_no_usable_token_is_refused(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(SimlmError, match="token: no token in it"):
        read_token(tmp_path / "token")
    monkeypatch.setenv("SIMLM_TOKEN", content)
    with pytest.raises(SimlmError, match="SIMLM_TOKEN: no token in it"):
        read_token(None)


def test_an_absent_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimlmError, match="the token cannot be read"):
        read_token(tmp_path / "absent")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("example", False)],
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_taken_port_is_an_error_that_says_so() -> None:
    first = bound_socket("127.0.0.1", 0)
    first.listen()
    assert first.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on, and answers take 40 ms longer
    try:
        with pytest.raises(SimlmError, match="cannot listen there"):
            bound_socket("127.0.0.1", first.getsockname()[1])
    finally:
        first.close()
