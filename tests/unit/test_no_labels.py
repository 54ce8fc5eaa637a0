"""Recipes without labels: what is planned, what is read, what is refused, what `simlm init` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simlm.artifacts import read_manifest
from simlm.data.datasets import find_splits, guess_sizes, open_dataset, signature
from simlm.data.formats import BadRecords
from simlm.errors import RecipeError
from simlm.estimates import estimate_step
from simlm.pipeline import make_plan, run_recipe, store_splits
from simlm.recipe import DataSettings, Recipe, load_recipe, parse_recipe
from simlm.scaffold import write_recipe
from tests.toy.corpus import split_of, write_beir

PSEUDO: dict[str, Any] = {"kinds": {"keywords": 1.0, "crop": 1.0}, "num_queries": 60, "dev_fraction": 0.2}
STARTS = {"start": "packaged:all-MiniLM-L6-v2", "pooling": "mean"}


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "toy",
        "output": str(folder / "run"),
        "data": {"dataset": "beir", "path": str(folder / "data")},
        "model": STARTS,
        "skip": ["pretrain"],
        "pseudo_queries": PSEUDO,
    }
    return parse_recipe(base | sections)


def steps_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    return {step.name: step.inputs for step in make_plan(recipe).steps}


# --- the plan


def test_queries_are_made_filtered_and_then_used_as_any_others(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    recipe = recipe_of(tmp_path, hybrid_teacher={})
    steps = steps_of(recipe)
    assert list(steps)[:9] == [
        "corpus",
        "bm25",
        "pseudo_queries",
        "pseudo_bm25_run",
        "start_embeddings",
        "start_index",
        "pseudo_start_run",
        "pseudo_hybrid_run",
        "store",
    ]
    assert steps["store"] == {"store": "pseudo_queries", "run": "pseudo_hybrid_run"}
    assert steps["start_index"]["store"] == "corpus"
    assert steps["bm25_train_run"] == {"store": "store", "index": "bm25"}
    assert steps["retriever1"] == {"store": "store", "groups": "bm25_groups"}
    assert steps["hybrid_teacher_scores"] == {
        "store": "store",
        "groups": "retriever2_groups",
        "index": "bm25",
        "embeddings": "start_embeddings",
    }
    assert steps["distilled"] == {"store": "store", "groups": "retriever2_groups", "teacher": "hybrid_teacher_scores"}
    assert "reranker_run" in steps
    assert "teacher_scores" not in steps
    assert store_splits(recipe) == ["train", "dev", "test"]


@pytest.mark.parametrize(
    ("consistency", "expected"),
    [
        ({"by": "none"}, {"store": "pseudo_queries"}),
        ({"by": "bm25"}, {"store": "pseudo_queries", "run": "pseudo_bm25_run"}),
        ({"by": "start"}, {"store": "pseudo_queries", "run": "pseudo_start_run"}),
        ({"by": "start", "trivial_share": 0.5}, {"store": "pseudo_queries", "run": "pseudo_start_run", "bm25": "pseudo_bm25_run"}),
        ({"by": "none", "trivial_share": 0.5}, {"store": "pseudo_queries", "bm25": "pseudo_bm25_run"}),
    ],
)
def test_who_filters(tmp_path: Path, consistency: dict[str, Any], expected: dict[str, str]) -> None:
    write_beir(tmp_path / "data")
    steps = steps_of(recipe_of(tmp_path, consistency=consistency))
    assert steps["store"] == expected
    assert {name for name in steps if name.startswith("pseudo_") and name.endswith("_run")} == set(expected.values()) - {"pseudo_queries"}


def test_a_changed_limit_searches_and_encodes_nothing_of_the_filter_again(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    before, after = (
        {step.name: step.fingerprint for step in make_plan(recipe_of(tmp_path, consistency={"within": within})).steps} for within in (5, 9)
    )
    same = {
        "corpus",
        "bm25",
        "pseudo_queries",
        "pseudo_bm25_run",
        "start_embeddings",
        "start_index",
        "pseudo_start_run",
        "pseudo_hybrid_run",
    }
    assert {name for name in before if before[name] == after[name]} == same


@pytest.mark.parametrize(
    ("sections", "teachers"),
    [
        ({}, {"teacher": "teacher_scores"}),
        ({"hybrid_teacher": {}}, {"teacher": "hybrid_teacher_scores"}),
        ({"hybrid_teacher": {"alone": False}}, {"teacher": "teacher_scores", "teacher.2": "hybrid_teacher_scores"}),
        ({"hybrid_teacher": {}, "skip": ["pretrain", "reranker", "retriever2"]}, {"teacher": "hybrid_teacher_scores"}),
    ],
)
def test_who_teaches(tmp_path: Path, sections: dict[str, Any], teachers: dict[str, str]) -> None:
    write_beir(tmp_path / "data")
    steps = steps_of(recipe_of(tmp_path, **sections))
    assert {role: step for role, step in steps["distilled"].items() if role.startswith("teacher")} == teachers


def test_the_best_retriever_so_far_can_be_the_dense_half_of_the_teacher(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    scored = steps_of(recipe_of(tmp_path, hybrid_teacher={"dense": "best"}))["hybrid_teacher_scores"]
    assert (scored["embeddings"], scored["model"]) == ("retriever2_embeddings", "retriever2")


def test_the_hybrid_teacher_fits_labelled_data_too(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    steps = steps_of(recipe_of(tmp_path, pseudo_queries=None, hybrid_teacher={}))
    assert steps["distilled"]["teacher"] == "hybrid_teacher_scores"
    assert "corpus" not in steps


def test_every_step_has_an_estimate(tmp_path: Path) -> None:
    write_beir(tmp_path / "data")
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    pseudo = {"kinds": {"crop": 1.0, "ask_claim": 1.0}, "num_queries": 1000, "endpoint": endpoint}
    plan = make_plan(recipe_of(tmp_path, pseudo_queries=pseudo, hybrid_teacher={}, consistency={"trivial_share": 0.5}))
    estimates = {step.name: estimate_step(plan, step) for step in plan.steps}
    assert all(estimate.seconds > 0 and estimate.memory_bytes > 0 for estimate in estimates.values())
    # Half of the 1,000 queries are answers, which take half a second each, eight at a time.
    assert estimates["pseudo_queries"].seconds > 500 * 0.5 / 8
    more = make_plan(recipe_of(tmp_path, pseudo_queries=PSEUDO, hybrid_teacher={}))
    assert estimate_step(more, more.step("pseudo_queries")).seconds < estimates["pseudo_queries"].seconds


# --- labels are not read


def test_training_and_dev_labels_change_nothing(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data")
    files, prints = [], []
    labels = ["", "query-id\tcorpus-id\tscore\n", "not even a qrels file"]
    for number, content in enumerate(labels):
        if content:
            for split in ("train", "dev"):
                (data / "qrels" / f"{split}.tsv").write_text(content, encoding="utf-8")
        recipe = unlabelled(data, tmp_path / f"run{number}")
        prints.append([step.fingerprint for step in make_plan(recipe).steps])
        run_recipe(recipe, only=["bm25_groups"], quiet=True)
        files.append({name: read_manifest(tmp_path / f"run{number}" / name).files for name in ("pseudo_queries", "store", "bm25_groups")})
    assert read_manifest(tmp_path / "run0" / "bm25_groups").facts["num_groups"] > 20
    assert files[0] == files[1] == files[2]
    # Nor do they make a step stale.
    assert prints[0] == prints[1] == prints[2]


def unlabelled(data: Path, run: Path) -> Recipe:
    """Queries made and filtered without any model."""
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return recipe_of(
        data,
        output=str(run),
        data={"dataset": "beir", "path": str(data)},
        model={"start": "scratch", "config": config},
        prepare={"train_vocabulary": 300, "num_workers": 1},
        consistency={"by": "bm25"},
    )


def test_splits_that_are_not_wanted_are_not_opened(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data")
    settings = DataSettings(dataset="beir", path=str(data), splits=["test"])
    # What would stop any reader.
    (data / "qrels" / "train.tsv").write_bytes(b"\xff\xfe not text")
    assert find_splits(settings) == ["test"]
    loader = open_dataset(settings)
    assert [path.name for path in loader.sources()] == ["corpus.jsonl.gz", "queries.jsonl.gz", "test.tsv"]
    assert list(loader.qrels("train", BadRecords("error"))) == []
    assert list(loader.queries("train", BadRecords("error"))) == []
    assert {qrel.query_id for _, qrel in loader.qrels("test", BadRecords("error"))} == {
        f"q{number}" for number in range(120) if split_of(number) == "test"
    }
    assert guess_sizes(settings) == (120, {"test": 20})
    assert not any("train" in name for name in signature(settings, {}))
    assert find_splits(settings.model_copy(update={"splits": []})) == []


# --- what does not fit together


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"pseudo_queries": {"kinds": {"crops": 1.0}}}, "unknown kind 'crops'; did you mean 'crop'"),
        ({"pseudo_queries": {"kinds": {"crop": 0.0}}}, "the share of 'crop' is 0.0"),
        ({"pseudo_queries": {"kinds": {}}}, "no kind of query"),
        ({"pseudo_queries": {"kinds": {"ask_claim": 1}}}, "kinds ask_claim come from an endpoint"),
        ({"pseudo_queries": {"endpoint": {"url": "http://127.0.0.1:8000/v1", "model": "m"}}}, "the endpoint is not asked for anything"),
        ({"pseudo_queries": {"kinds": {"ask_claim": 1}, "endpoint": {"url": "127.0.0.1:8000", "model": "m"}}}, "an address like"),
        ({"pseudo_queries": {"words": [9, 4]}}, r"words = \[9, 4\]: fewest first"),
        ({"pseudo_queries": {"dev_fraction": 1.0}}, "leaves no training queries"),
        ({"data": {"path": "x", "splits": ["train", "test"]}}, r"data.splits names \['train'\]"),
        ({"data": {"path": "x", "max_queries": {"train": 5}}}, "data.max_queries limits training or dev queries"),
        ({"pseudo_queries": None, "consistency": {"within": 3}}, r"\[consistency\] filters pseudo queries"),
        ({"consistency": {"by": "reranker"}}, "set both or neither"),
        ({"consistency": {"reranker": "x"}}, "set both or neither"),
        ({"consistency": {"within": 200}}, "within = 200 is more than depth = 100"),
        ({"model": {"start": "scratch"}}, 'consistency.by = "hybrid" searches with model.start'),
        ({"hybrid_teacher": {}, "skip": ["distilled"]}, r"\[hybrid_teacher\] teaches the distilled retriever"),
        ({"hybrid_teacher": {}, "teacher": {"extra": ["some/model"]}}, "hybrid_teacher.alone keeps other teachers out"),
        ({"hybrid_teacher": {}, "consistency": {"by": "bm25"}, "model": {"start": "scratch"}}, 'hybrid_teacher.dense = "start"'),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, **sections)


# --- simlm init


@pytest.mark.parametrize("splits", [(), ("test",)])
def test_init_of_data_without_training_labels_writes_the_recipe_without_labels(tmp_path: Path, splits: tuple[str, ...]) -> None:
    data = write_beir(tmp_path / "data", splits=splits)
    (data / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    path, summary = write_recipe(data, tmp_path / "mine.toml")
    assert "makes queries from the passages" in summary
    recipe = load_recipe(path, [f"output={json.dumps(str(tmp_path / 'run'))}"])
    assert recipe.pseudo_queries is not None
    assert recipe.hybrid.method == "score"
    steps = {step.name for step in make_plan(recipe).steps}
    assert {"pseudo_queries", "store", "distilled", "hybrid_run", "report"} <= steps


def test_init_of_texts_makes_queries_too(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.md").write_text("# Rain\n\nIt rains on the copper violin.\n", encoding="utf-8")
    path, _ = write_recipe(tmp_path / "texts", tmp_path / "mine.toml")
    recipe = load_recipe(path)
    assert recipe.data.dataset == "text"
    assert store_splits(recipe) == ["train", "dev"]


def test_init_with_training_labels_uses_them(tmp_path: Path) -> None:
    path, summary = write_recipe(write_beir(tmp_path / "data"), tmp_path / "mine.toml")
    assert load_recipe(path).pseudo_queries is None
    assert "makes queries" not in summary


def test_the_projects_recipe_reads_as_it_says() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "no_labels.toml")
    assert recipe.pseudo_queries is not None and recipe.hybrid_teacher is not None
    assert (recipe.hybrid.method, recipe.hybrid.dense_weight) == ("score", 0.5)
    assert recipe.distilled.initial == "start"
