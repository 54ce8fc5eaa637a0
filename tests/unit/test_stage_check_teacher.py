"""check_teacher and what distill does after it, on a tiny store with made-up scores; samples of queries that a teacher scores."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from simlm.artifacts import ArtifactBuilder, build_artifact
from simlm.errors import DataError, RecipeError
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.progress import Progress
from simlm.rankings import Groups, Run, offsets_of
from simlm.recipe import CheckTeacherSettings, DistillSettings, ModelSettings, RerankSettings, SampledRerankSettings, TrainingSettings
from simlm.stages import Context, check_teacher, distill, rerank
from simlm.training.callbacks import read_log
from simlm.training.dev import judged_sample
from simlm.training.initial import initial_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

MODEL = ModelSettings(
    start="scratch",
    config={
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 96,
    },
)
NUM_TRAIN, NUM_DEV = 36, 12
Scores = Callable[[int], list[float]]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()


def right(_: int) -> list[float]:
    """The positive, which is the first of a list, is scored highest."""
    return [4.0, 1.0, 0.0, -2.0]


def wrong(_: int) -> list[float]:
    return [-2.0, 1.0, 0.0, -1.0]


def half(query: int) -> list[float]:
    return right(query) if query % 2 else wrong(query)


def lists_of(store: Store, split: Any, count: int) -> list[list[int]]:
    """The positive of each query and three other passages."""
    qrels = store.qrels(split)
    return [[positive, *((positive + 7 * place) % 60 for place in (1, 2, 3))] for positive in (next(iter(qrels[q])) for q in range(count))]


def write_run(path: Path, split: Any, lists: list[list[int]], scores: Scores, **settings: Any) -> Path:
    with build_artifact(path, kind="run", settings=settings) as builder:
        Run.from_lists(split, range(len(lists)), [(rows, scores(query)) for query, rows in enumerate(lists)]).save(builder.work)
    return path


def write_groups(path: Path, lists: list[list[int]]) -> Path:
    rows = np.array(lists, dtype=np.int64)
    nothing = np.full(rows.size, np.nan, dtype=np.float32)
    with build_artifact(path, kind="groups") as builder:
        Groups(
            "train",
            np.arange(len(rows)),
            offsets_of([1] * len(rows)),
            rows[:, 0],
            nothing[: len(rows)],
            offsets_of([3] * len(rows)),
            rows[:, 1:].reshape(-1),
            nothing[: rows[:, 1:].size],
        ).save(builder.work)
    return path


Inputs = Callable[..., dict[str, Path]]


@pytest.fixture
def inputs_of(tiny_store: Store, tmp_path: Path) -> Inputs:
    """Inputs of check_teacher: what teacher and student say of the training groups and of the dev candidates."""

    def make(*, teacher: Scores, student: Scores, dev: bool = True) -> dict[str, Path]:
        train = lists_of(tiny_store, "train", NUM_TRAIN)
        found = {
            "store": tiny_store.path,
            "groups": write_groups(tmp_path / "groups", train),
            "teacher": write_run(tmp_path / "teacher", "train", train, teacher),
            "student_scores": write_run(tmp_path / "student_scores", "train", train, student),
        }
        if dev:
            candidates = lists_of(tiny_store, "dev", NUM_DEV)
            # Of the run the scores are cosines.
            found["dev_student"] = write_run(
                tmp_path / "dev_student", "dev", candidates, lambda query: [score * 0.02 for score in student(query)]
            )
            found["dev_teacher"] = write_run(tmp_path / "dev_teacher", "dev", candidates, teacher)
        return found

    return make


def context(folder: Path, kind: Any = "model", **options: Any) -> Context:
    builder = ArtifactBuilder(folder, kind=kind, stage="test", code_version=1, fingerprint="same")
    builder.begin()
    return Context(builder, **({"seed": 1, "progress": Progress(quiet=True)} | options))


def check(inputs: dict[str, Path], folder: Path, **settings: Any) -> dict[str, Any]:
    made = context(folder, "report")
    check_teacher.run(CheckTeacherSettings.model_validate(settings), inputs, made)
    assert json.loads((made.work / "comparison.json").read_text(encoding="utf-8")) == made.builder.facts
    made.builder.finish(settings={}, inputs={}, seed=1, seconds=1.0, peak_memory_bytes=0)
    return dict(made.builder.facts)


# --- the comparison


def test_a_worse_teacher_on_dev(inputs_of: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(teacher=half, student=right)
    made = context(tmp_path / "check", "report", progress=Progress())
    check_teacher.run(CheckTeacherSettings(if_worse="skip"), inputs, made)
    facts = made.builder.facts
    # Six of twelve queries have the positive last of four.
    assert (facts["measured_on"], facts["measure"], facts["num_queries"]) == ("dev", "RR@10", NUM_DEV)
    assert (facts["teacher"], facts["student"], facts["lost"]) == (pytest.approx(0.625), 1.0, 6)
    assert facts["p_value"] == pytest.approx(2 / 64)
    assert (facts["outcome"], facts["action"]) == ("worse", "skip")
    assert facts["training_groups"]["num_queries"] == NUM_TRAIN
    assert (facts["training_groups"]["teacher_accuracy"], facts["training_groups"]["student_accuracy"]) == (0.5, 1.0)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "The teacher is worse than retriever 2" in told and "RR@10 0.625 against 1.000 on 12 dev queries, p = 0.031" in told


def test_the_depth_cuts_the_students_list(inputs_of: Inputs, tmp_path: Path) -> None:
    inputs = inputs_of(teacher=right, student=wrong)
    assert check(inputs, tmp_path / "deep")["teacher"] == 1.0
    # The student has the positive at rank 4: among its first three nobody can find it.
    shallow = check(inputs, tmp_path / "shallow", depth=3)
    assert (shallow["teacher"], shallow["student"], shallow["outcome"]) == (0.0, 0.0, "level")


def test_without_dev_queries_the_training_groups_are_compared(
    inputs_of: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(teacher=half, student=right, dev=False)
    made = context(tmp_path / "check", "report", progress=Progress())
    check_teacher.run(CheckTeacherSettings(), inputs, made)
    facts = made.builder.facts
    assert (facts["measured_on"], facts["measure"], facts["num_queries"], facts["outcome"]) == ("train", "RR", NUM_TRAIN, "worse")
    told = capsys.readouterr().err.replace("\n", " ")
    assert "there are no dev queries to compare teacher and student on" in told
    assert "36 training groups, which both were trained on" in told


def test_dev_queries_for_which_nothing_was_found(inputs_of: Inputs, tmp_path: Path) -> None:
    inputs = inputs_of(teacher=half, student=right)
    some = [[7, 8], [], []]
    inputs["dev_student"] = write_run(tmp_path / "found", "dev", some, lambda query: [0.5, 0.4][: len(some[query])])
    inputs["dev_teacher"] = write_run(tmp_path / "scored", "dev", some, lambda query: [1.0, 2.0][: len(some[query])])
    assert check(inputs, tmp_path / "one")["num_queries"] == 1
    for role in ("dev_student", "dev_teacher"):
        inputs[role] = write_run(tmp_path / f"nothing-{role}", "dev", [[], []], lambda _: [])
    assert check(inputs, tmp_path / "none")["measured_on"] == "train"


def test_groups_without_any_negative(inputs_of: Inputs, tmp_path: Path) -> None:
    inputs = inputs_of(teacher=half, student=right)
    with build_artifact(tmp_path / "bare", kind="groups") as builder:
        groups = Groups.load(inputs["groups"]).take(np.arange(0))
        groups.save(builder.work)
    facts = check(inputs | {"groups": tmp_path / "bare"}, tmp_path / "check")
    assert (facts["training_groups"]["num_queries"], facts["training_groups"]["p_value"], facts["measured_on"]) == (0, None, "dev")
    without = {role: path for role, path in inputs.items() if not role.startswith("dev")}
    facts = check(without | {"groups": tmp_path / "bare"}, tmp_path / "nothing", interpolate=True)
    assert (facts["num_queries"], facts["outcome"]) == (0, "level")


def test_a_score_that_is_missing_is_named(inputs_of: Inputs, tmp_path: Path, tiny_store: Store) -> None:
    inputs = inputs_of(teacher=right, student=right)
    lists = lists_of(tiny_store, "train", NUM_TRAIN)
    inputs["student_scores"] = write_run(tmp_path / "holes", "train", lists[1:], right)
    with pytest.raises(DataError, match=r"the student's run \(35 queries\) has no score for"):
        check(inputs, tmp_path / "check")
    lists = lists_of(tiny_store, "dev", NUM_DEV)
    inputs["student_scores"] = inputs["teacher"]
    inputs["dev_teacher"] = write_run(tmp_path / "dev_holes", "dev", [rows[:3] for rows in lists], lambda query: right(query)[:3])
    with pytest.raises(DataError, match=r"the teacher's run \(12 queries\) has no score for 12 pairs"):
        check(inputs, tmp_path / "check2")


def test_a_large_set_of_groups_is_sampled(inputs_of: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_teacher, "CHECKED_GROUPS", 10)
    facts = check(inputs_of(teacher=half, student=right), tmp_path / "check")
    assert facts["training_groups"]["num_queries"] == 10
    assert facts["num_queries"] == NUM_DEV


# --- what distill does after it


def distill_settings(**options: Any) -> DistillSettings:
    training = TrainingSettings.model_validate({"learning_rate": 1e-3, "max_steps": 1, "logging_steps": 1, "use_cpu": True})
    shared = {"initial": "start", "model": MODEL, "queries_per_step": 4, "group_size": 4, "micro_batch_tokens": 400, "training": training}
    return DistillSettings(**(shared | options))


def write_check(path: Path, **facts: Any) -> Path:
    with build_artifact(path, kind="report") as builder:
        (builder.work / "comparison.json").write_text("{}", encoding="utf-8")
        builder.facts.update({"student_name": "retriever2", "outcome": "worse"} | facts)
    return path


def write_student(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = BiEncoder(load_encoder(MODEL, seed=3, tokenizer=tokenizer), "cls")
    with build_artifact(path, kind="model") as builder:
        model.save(builder.work, tokenizer, max_query_tokens=24, max_passage_tokens=64, query_prompt="", passage_prompt="", matryoshka=[])
        (builder.work / "log.jsonl").write_text('{"kind": "train", "step": 1, "measures": {}}\n', encoding="utf-8")
    return path


def test_a_teacher_with_nothing_to_teach_leaves_the_student_as_it_was(
    inputs_of: Inputs, tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast
) -> None:
    inputs = inputs_of(teacher=half, student=right)
    student = write_student(tmp_path / "student", tiny_wordpiece)
    more = {"check": write_check(tmp_path / "check", action="skip"), "student": student}
    for _ in range(2):  # begun again after a kill it does the same
        made = context(tmp_path / "out")
        distill.run(distill_settings(), inputs | more, made)
    assert (made.builder.facts["distilled"], made.builder.facts["copy_of"]) == (False, "retriever2")
    copied = {file.relative_to(made.work).as_posix() for file in made.work.rglob("*") if file.is_file() and "resume" not in file.parts}
    own = {file.relative_to(student).as_posix() for file in student.rglob("*") if file.is_file()}
    assert own - copied == {"manifest.json", "log.jsonl"}
    finished = made.builder.finish(settings={}, inputs={}, seed=1, seconds=1.0, peak_memory_bytes=0)
    expected = BiEncoder.load(student).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in BiEncoder.load(finished.path).state_dict().items())


def first_entropy(made: Context) -> float:
    return float(next(line for line in read_log(made.work / "log.jsonl") if line["kind"] == "train")["measures"]["teacher_entropy"])


def test_a_mixture_is_distilled_as_it_was_found(inputs_of: Inputs, tmp_path: Path) -> None:
    inputs = inputs_of(teacher=wrong, student=right)
    entropies = {}
    for name, facts in {
        "teacher": {"action": "teach"},
        "dull": {"action": "mix", "teacher_weight": 0.25, "sharpness": 0.001},
        "sharp": {"action": "mix", "teacher_weight": 0.25, "sharpness": 100.0},
    }.items():
        made = context(tmp_path / name)
        distill.run(distill_settings(), inputs | {"check": write_check(tmp_path / f"check-{name}", **facts)}, made)
        entropies[name] = first_entropy(made)
        assert made.builder.facts["teacher_weight"] == facts.get("teacher_weight", 1.0)
        assert (made.builder.facts["distilled"], made.builder.facts["num_teachers"]) == (True, 1)
    scores = np.array(wrong(0))
    softmax = np.exp(scores) / np.exp(scores).sum()
    assert entropies["teacher"] == pytest.approx(float(-(softmax * np.log(softmax)).sum()), rel=1e-4)
    assert entropies["dull"] == pytest.approx(np.log(4), rel=1e-4)
    assert entropies["sharp"] == pytest.approx(0.0, abs=1e-3)


def test_a_sample_of_the_queries_is_distilled_from_those_alone(inputs_of: Inputs, tmp_path: Path, tiny_store: Store) -> None:
    inputs = inputs_of(teacher=right, student=right)
    lists = lists_of(tiny_store, "train", NUM_TRAIN)
    some = write_run(tmp_path / "some", "train", lists[:9], right, num_queries=9)
    made = context(tmp_path / "out")
    distill.run(distill_settings(), inputs | {"teacher": some}, made)
    assert made.builder.facts["num_groups"] == 9
    assert check(inputs | {"teacher": some}, tmp_path / "check")["training_groups"]["num_queries"] == 9
    # Where nobody asked for a sample, queries that are missing are an error.
    unasked = write_run(tmp_path / "unasked", "train", lists[:9], right)
    with pytest.raises(DataError, match=r"no score for 108 pairs"):
        distill.run(distill_settings(), inputs | {"teacher": unasked}, context(tmp_path / "refused"))


def test_starting_from_the_retriever_before(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    student = write_student(tmp_path / "student", tiny_wordpiece)
    assert initial_model("retriever2", MODEL, {"model": student}).start == str(student)
    with pytest.raises(RecipeError, match="no retriever was given"):
        initial_model("retriever2", MODEL, {})


# --- a sample of what a re-ranker scores


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("reranker") / "model"
    with build_artifact(path, kind="model") as builder:
        CrossEncoder.from_encoder(MODEL, seed=5, tokenizer=tiny_wordpiece).save(builder.work, tiny_wordpiece, max_pair_tokens=48)
    return path


def reranked(path: Path, settings: RerankSettings, inputs: dict[str, Path], split: Any, seed: int = 1) -> tuple[Run, dict[str, Any]]:
    with build_artifact(path, kind="run", settings=settings.model_dump()) as builder:
        rerank.run(settings, inputs, Context(builder, seed, Progress(quiet=True)))
    return Run.load(path, split), builder.facts


def test_some_judged_queries_of_a_run(tmp_path: Path, tiny_store: Store, reranker: Path) -> None:
    first = write_run(tmp_path / "first", "dev", lists_of(tiny_store, "dev", NUM_DEV), right)
    inputs = {"store": tiny_store.path, "model": reranker, "run": first}
    settings = SampledRerankSettings(splits=["dev"], depth=2, num_queries=5, precision="fp32")
    run, facts = reranked(tmp_path / "some", settings, inputs, "dev")
    # The queries of the dev measure that training shows.
    assert run.query_rows.tolist() == sorted(judged_sample(tiny_store, "dev", 5, 1))
    assert (len(run), facts["num_pairs"]) == (5, 10)
    assert "milliseconds_per_query" not in facts
    other, _ = reranked(tmp_path / "other", settings, inputs, "dev", seed=2)
    assert other.query_rows.tolist() != run.query_rows.tolist()
    every, _ = reranked(tmp_path / "all", settings.model_copy(update={"num_queries": 500}), inputs, "dev")
    assert len(every) == NUM_DEV


def test_some_groups(tmp_path: Path, tiny_store: Store, reranker: Path) -> None:
    inputs = {
        "store": tiny_store.path,
        "model": reranker,
        "groups": write_groups(tmp_path / "groups", lists_of(tiny_store, "train", NUM_TRAIN)),
    }
    settings = SampledRerankSettings(splits=["train"], depth=1, num_queries=7, precision="fp32")
    run, facts = reranked(tmp_path / "some", settings, inputs, "train")
    assert (len(run), facts["num_pairs"], facts["num_queries"]) == (7, 14, 7)
    assert run.query_rows.tolist() == sorted(set(run.query_rows.tolist()))
    every, _ = reranked(tmp_path / "all", settings.model_copy(update={"num_queries": 36}), inputs, "train")
    assert len(every) == NUM_TRAIN


def test_who_samples_nothing_has_the_settings_of_before() -> None:
    """So that what was scored before there was a choice stays done."""
    assert SampledRerankSettings().model_dump(mode="json") == RerankSettings().model_dump(mode="json")
    assert SampledRerankSettings(num_queries=3).model_dump(mode="json")["num_queries"] == 3
