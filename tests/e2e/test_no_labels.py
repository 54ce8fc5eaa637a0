"""The recipe without labels from end to end, with a starting model, so that BM25 and that model filter and teach together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import simlm
from simlm.artifacts import read_manifest
from simlm.data.store import Store
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.pipeline import make_plan, run_recipe
from simlm.recipe import ModelSettings, load_recipe
from tests.toy.corpus import TINY, write_beir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = Path(__file__).parents[2] / "recipes" / "no_labels.toml"
CONFIG = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def start(tmp_path: Path, tiny_wordpiece: PreTrainedTokenizerFast) -> Path:
    """A starting model with its tokenizer, in a folder."""
    model = BiEncoder(load_encoder(ModelSettings(start="scratch", config=CONFIG), seed=1, tokenizer=tiny_wordpiece), "mean")
    (tmp_path / "start").mkdir()
    model.save(tmp_path / "start", tiny_wordpiece, max_query_tokens=16, max_passage_tokens=48)
    return tmp_path / "start"


def test_a_corpus_without_labels_gets_a_retriever(tmp_path: Path, start: Path) -> None:
    write_beir(tmp_path / "data", splits=("test",))
    tiny = [change for change in TINY if not change.startswith(("model.", "prepare.train_vocabulary", "search.depth"))]
    changes = [
        *tiny,
        f"model.start={json.dumps(str(start))}",
        f"data.path={json.dumps(str(tmp_path / 'data'))}",
        f"output={json.dumps(str(tmp_path / 'run'))}",
        "pseudo_queries.num_queries=150",
        "consistency.within=20",
        "consistency.depth=50",
    ]
    recipe = load_recipe(RECIPE, changes)
    folder = run_recipe(recipe, quiet=True)

    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in metrics["rows"]] == ["bm25", "start", "retriever1", "retriever2", "reranker", "distilled", "hybrid"]
    store = Store.open(folder / "store")
    assert store.splits == ["train", "dev", "test"]
    kept = read_manifest(folder / "store").facts["train"]
    assert 0 < kept["kept"] == len(store.queries("train")) < kept["num_queries"]
    taught = read_manifest(folder / "hybrid_teacher_scores").facts
    assert taught["num_queries"] == read_manifest(folder / "retriever2_groups").facts["num_groups"]
    assert read_manifest(folder / "distilled").facts["num_teachers"] == 1
    assert read_manifest(folder / "hybrid_run").facts["chosen_on"] == "settings"

    results = simlm.open_run(folder, mode="hybrid").search(store.queries("test").text(0), depth=3)
    assert len(results) == 3
    assert results[0].score >= results[1].score
    plan = make_plan(recipe)
    assert {plan.state(step)[0] for step in plan.steps} == {"done"}
