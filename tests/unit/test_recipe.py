"""Recipes: what is accepted, and what the errors say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from simlm.errors import RecipeError
from simlm.recipe import Recipe, TrainingSettings, expand_path, load_recipe, parse_recipe
from simlm.training_options import OPTIONS, RESERVED

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_parse(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_defaults_are_the_papers() -> None:
    recipe = parse_recipe({"name": "x"})
    assert (recipe.pretrain.encoder_mask_rate, recipe.pretrain.decoder_mask_rate, recipe.pretrain.decoder_layers) == (0.3, 0.5, 2)
    assert recipe.pretrain.passages_per_step == 2048
    assert (recipe.retriever1.temperature, recipe.retriever1.queries_per_step, recipe.retriever1.group_size) == (0.02, 64, 16)
    assert (recipe.distilled.contrastive_weight, recipe.distilled.group_size, recipe.distilled.teacher_temperature) == (0.2, 24, 1.0)
    assert (recipe.reranker.group_size, recipe.reranker.train_hardest, recipe.reranker.max_pair_tokens) == (64, 16, 192)
    assert (recipe.prepare.max_passage_tokens, recipe.prepare.max_query_tokens, recipe.mining.depth) == (144, 32, 200)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"name": "x", "retreiver1": {}}, ["unknown key 'retreiver1'", "did you mean 'retriever1'?"]),
        ({"name": "x", "pretrain": {"objectve": "replaced_lm"}}, ["unknown key 'pretrain.objectve'", "did you mean 'objective'?"]),
        ({"name": "x", "pretrain": {"encoder_mask_rate": 1.5}}, ["pretrain.encoder_mask_rate", "less than 1", "1.5"]),
        ({"name": "x", "pretrain": {"encoder_mask_rate": 0.6, "decoder_mask_rate": 0.5}}, ["decoder_mask_rate 0.5", "superset"]),
        ({"name": "x", "retriever1": {"queries_per_step": "64"}}, ["retriever1.queries_per_step", "'64'"]),
        (
            {"name": "x", "retriever1": {"training": {"learning_rte": 1e-5}}},
            ["unknown training option 'learning_rte'", "did you mean 'learning_rate'?"],
        ),
        (
            {"name": "x", "retriever1": {"training": {"per_device_train_batch_size": 8}}},
            ["per_device_train_batch_size", "queries_per_step"],
        ),
        ({"name": "a/b"}, ["name", "plain folder name"]),
        ({"name": "x", "distilled": {"group_size": 1}}, ["distilled.group_size", "greater than or equal to 2"]),
    ],
)
def test_errors_name_the_key(raw: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, where="my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    for word in words:
        assert word in message


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "x", "sed": 1, "mining": {"depth": 0}})
    assert "unknown key 'sed'" in str(caught.value)
    assert "mining.depth" in str(caught.value)


def test_set_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[mining]\ndepth = 10\n', encoding="utf-8")
    recipe = load_recipe(
        path, ["mining.depth=7", "retriever1.training.learning_rate=1e-4", "model.start=bert-base-uncased", 'skip=["pretrain"]']
    )
    assert recipe.mining.depth == 7
    assert recipe.retriever1.training.learning_rate == 1e-4
    assert recipe.model.start == "bert-base-uncased"
    assert recipe.skip == ["pretrain"]
    with pytest.raises(RecipeError, match=r"expected section\.key=value"):
        load_recipe(path, ["mining.depth"])
    with pytest.raises(RecipeError, match="is a value, not a section"):
        load_recipe(path, ["mining.depth.more=1"])


def test_a_missing_broken_or_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [", encoding="utf-8")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(broken)


def test_a_recipe_without_a_name_takes_its_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n", encoding="utf-8")
    assert load_recipe(path).name == "mine"


def test_training_options_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(RESERVED) | set(OPTIONS) == fields
    assert not set(RESERVED) & set(OPTIONS)


def test_training_settings_pass_options_on_and_take_integers() -> None:
    settings = TrainingSettings.model_validate({"learning_rate": 1, "adam_beta2": 0.98})
    assert settings.learning_rate == 1.0
    assert (settings.model_extra or {})["adam_beta2"] == 0.98
    assert settings.with_defaults(learning_rate=3.0, weight_decay=0.5).weight_decay == 0.5
    assert settings.with_defaults(learning_rate=3.0).learning_rate == 1.0


def test_paths_expand_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMLM_DATA", "/somewhere")
    assert expand_path("$SIMLM_DATA/squad") == Path("/somewhere/squad")
    monkeypatch.delenv("SIMLM_DATA")
    assert expand_path("$SIMLM_DATA/squad") == Path("../shared/data/squad")


def test_settings_do_not_change_after_reading() -> None:
    recipe = Recipe(name="x")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
