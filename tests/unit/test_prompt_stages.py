"""Prompts of a retriever stage: trained with, measured with, saved, and used by the steps behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from simlm import load_retriever
from simlm.artifacts import build_artifact
from simlm.data.groups import TrainingGroups
from simlm.data.store import Store
from simlm.errors import RecipeError
from simlm.models.backbone import quiet
from simlm.progress import Progress
from simlm.rankings import Groups, Run
from simlm.recipe import DevSettings, DistillSettings, EncodeSettings, IndexSettings, RetrieverSettings, SearchSettings
from simlm.stages import Context, build_index, distill, encode, search, train_retriever
from simlm.training.contrastive import ContrastiveBatches, prompts_of
from tests.unit.test_training_stages import MODEL, _quick_collection, context, inputs, retriever_settings, training

__all__ = ["_quick_collection", "inputs"]  # fixtures

PROMPTS = {"query_prompt": "where: ", "passage_prompt": "of the "}


def test_batches_of_training_hold_the_prompts(inputs: dict[str, Path], tiny_store: Store) -> None:
    settings = RetrieverSettings(queries_per_step=4, group_size=3, max_query_tokens=20, **PROMPTS)
    groups = TrainingGroups(Groups.load(inputs["groups"]), num_passages=60, group_size=3, queries_per_step=4, seed=1, num_ranks=1)
    prompts = prompts_of(tiny_store, settings)
    (batch,) = ContrastiveBatches(tiny_store, groups, settings, 1, *prompts).load(0, 0, 1)
    (bare,) = ContrastiveBatches(tiny_store, groups, settings, 1).load(0, 0, 1)
    tokenizer = tiny_store.tokenizer()
    beginnings: dict[str, int] = {"query": 0, "passage": 0}
    for piece in batch["pieces"]:
        for ids in piece["input_ids"].tolist():
            for name in beginnings:
                prompt = tokenizer(PROMPTS[f"{name}_prompt"], add_special_tokens=False)["input_ids"]
                beginnings[name] += ids[1 : 1 + len(prompt)] == prompt
            assert ids.count(tokenizer.cls_token_id) == 1
    assert beginnings["query"] == 4 and beginnings["passage"] == 12
    tokens, without = (sum(int(piece["attention_mask"].sum()) for piece in found["pieces"]) for found in (batch, bare))
    assert without < tokens <= without + 4 * 2 + 12 * 2 + 4 * 2  # "where", ":", "of", "the"; some tokens more or fewer at the maximum


@pytest.mark.parametrize("stage", [train_retriever, distill])
def test_the_dev_measure_is_that_of_the_saved_model(inputs: dict[str, Path], tmp_path: Path, tiny_store: Store, stage: Any) -> None:
    kind: Any = {"kind": DistillSettings} if stage is distill else {}
    settings = retriever_settings(**kind, **PROMPTS, dev=DevSettings(pool_passages=60), training=training(learning_rate=0.02, bf16=False))
    made = context(tmp_path / "out")
    stage.run(settings, inputs, made)
    saved = json.loads((made.work / "simlm.json").read_text(encoding="utf-8"))
    assert {name: saved[name] for name in PROMPTS} == PROMPTS
    theirs = json.loads((made.work / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    assert theirs == {"query": "where: ", "document": "of the "}
    retriever = load_retriever(made.work, device="cpu")
    table, dev = tiny_store.passages, tiny_store.queries("dev")
    passages = retriever.encode_passages([(table.title(row), table.text(row)) for row in range(60)])
    scores = retriever.encode_queries([dev.text(row) for row in range(12)]) @ passages.T
    ranks = [1 + int((scores[query] > scores[query, next(iter(rows))]).sum()) for query, rows in tiny_store.qrels("dev").items()]
    assert made.builder.facts["dev"]["RR@10"] == pytest.approx(np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]), abs=1e-6)


def test_prompts_go_along_from_the_checkpoint_unless_the_recipe_says_otherwise(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = context(tmp_path / "first")
    train_retriever.run(retriever_settings(**PROMPTS, training=training(max_steps=1)), inputs, first)
    start = first.builder.finish(settings={}, inputs={}, seed=1, seconds=1.0, peak_memory_bytes=0).path
    for number, (given, expected) in enumerate(
        [({}, ("where: ", "of the ")), ({"query_prompt": ""}, ("", "of the ")), ({"passage_prompt": "a "}, ("where: ", "a "))]
    ):
        made = context(tmp_path / str(number))
        train_retriever.run(retriever_settings(initial=str(start), training=training(max_steps=1), **given), inputs, made)
        retriever = load_retriever(made.work, device="cpu")
        assert (retriever.query_prompt, retriever.passage_prompt) == expected


def test_prompts_of_the_model_section(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"query_prompt": "which "})
    made = context(tmp_path / "out")
    train_retriever.run(retriever_settings(model=model, training=training(max_steps=1)), inputs, made)
    assert load_retriever(made.work, device="cpu").query_prompt == "which "


def test_a_prompt_without_room_is_refused_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = context(tmp_path / "out")
    settings = retriever_settings(query_prompt="where what which: ", max_query_tokens=6)
    with pytest.raises(RecipeError, match=r"query_prompt 'where what which: ' takes .* but a sequence has 6: no room"):
        train_retriever.run(settings, inputs, made)
    assert not (made.work / "log.jsonl").exists()


def test_encode_and_search_use_the_prompts_of_the_model(inputs: dict[str, Path], tmp_path: Path, tiny_store: Store) -> None:
    torch.set_num_threads(1)
    first = context(tmp_path / "model")
    train_retriever.run(retriever_settings(**PROMPTS, max_query_tokens=9, training=training(max_steps=1)), inputs, first)
    model = first.builder.finish(settings={}, inputs={}, seed=1, seconds=1.0, peak_memory_bytes=0).path
    given = {"store": tiny_store.path, "model": model}
    for stage, name, settings in (
        (encode, "embeddings", EncodeSettings(precision="fp32")),
        (build_index, "index", IndexSettings()),
        (search, "run", SearchSettings(splits=["dev"], depth=60, precision="fp32")),
    ):
        with build_artifact(tmp_path / name, kind=name) as builder:  # type: ignore[arg-type]
            stage.run(settings, given, Context(builder, 0, Progress(quiet=True)))  # type: ignore[attr-defined]
        given[name] = tmp_path / name
    table, dev = tiny_store.passages, tiny_store.queries("dev")
    with quiet():
        theirs = SentenceTransformer(str(model), device="cpu")
    passages = theirs.encode_document([(table.title(row), table.text(row)) if table.title(row) else table.text(row) for row in range(60)])
    np.testing.assert_allclose(np.load(tmp_path / "embeddings" / "vectors.npy"), passages, atol=1e-5)
    scores = theirs.encode_query([dev.text(row) for row in range(12)]) @ passages.T
    for query, rows, found in Run.load(tmp_path / "run", "dev"):
        np.testing.assert_allclose(found, scores[query, rows], atol=1e-5)
