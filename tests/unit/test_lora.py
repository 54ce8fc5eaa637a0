"""LoRA: what is trained, what is saved, kills, several processes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from simlm import load_recipe
from simlm.errors import MissingExtraError, ModelError, RecipeError
from simlm.models.backbone import load_encoder, quiet
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.lora import add_lora, merge_lora
from simlm.pipeline import make_plan
from simlm.recipe import DistillSettings, LoraSettings, ModelSettings, RerankerSettings, parse_recipe
from simlm.stages import distill, train_reranker, train_retriever
from simlm.training import trainer
from tests.parity.test_sentence_transformers import FAMILIES, spread
from tests.toy.corpus import TINY, write_beir
from tests.unit.test_training_stages import MODEL, _quick_collection, _stop_after, context, inputs, retriever_settings, training, weights

if TYPE_CHECKING:
    from simlm.data.store import Store

pytest.importorskip("peft")
__all__ = ["_quick_collection", "inputs"]  # fixtures

LORA = LoraSettings(rank=2, alpha=4)
RECIPE = Path(__file__).parents[2] / "recipes" / "medquad_cpu.toml"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def tiny_encoder(family: str, request: pytest.FixtureRequest) -> Any:
    tokenizer, config = FAMILIES[family]
    settings = ModelSettings(start="scratch", config={"model_type": family, **config})
    return load_encoder(settings, tokenizer=request.getfixturevalue(tokenizer), dropout=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_the_same_function_in_the_same_layers(family: str, request: pytest.FixtureRequest) -> None:
    encoder = tiny_encoder(family, request)
    spread(encoder)
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    tokens = torch.tensor([[2, 7, 9, 11, 3]])
    start = encoder(input_ids=tokens).last_hidden_state
    add_lora(encoder, LORA, seed=3)
    # B is 0: it starts as the checkpoint.
    torch.testing.assert_close(encoder(input_ids=tokens).last_hidden_state, start, rtol=0, atol=1e-6)
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert trained and all("lora_A" in name or "lora_B" in name for name in trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=generator)
    adapted = encoder(input_ids=tokens).last_hidden_state
    assert (adapted - start).abs().max() > 0.1
    merge_lora(encoder)
    assert encoder.state_dict().keys() == before.keys()
    torch.testing.assert_close(encoder(input_ids=tokens).last_hidden_state, adapted, rtol=0, atol=2e-5)
    assert all(weight.requires_grad for weight in encoder.parameters())
    assert all(
        not isinstance(module, torch.nn.Embedding) or torch.equal(module.weight, before[f"{name}.weight"])
        for name, module in encoder.named_modules()
    )


def test_a_merged_layer_by_hand(request: pytest.FixtureRequest) -> None:
    encoder = tiny_encoder("bert", request)
    add_lora(encoder, LoraSettings(rank=1, alpha=3, target_modules=["query"]), seed=0)
    layer = encoder.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.arange(16.0)[None])
        layer.lora_B["default"].weight.copy_(torch.ones(16, 1))
    original = layer.base_layer.weight.clone()
    merge_lora(encoder)
    # alpha / rank x B A: 3 x the numbers 0..15 in every row.
    torch.testing.assert_close(encoder.encoder.layer[0].attention.self.query.weight - original, 3 * torch.arange(16.0).repeat(16, 1))


def test_only_the_modules_named(request: pytest.FixtureRequest) -> None:
    encoder = tiny_encoder("bert", request)
    add_lora(encoder, LoraSettings(target_modules=["query", "output.dense"]), seed=0)
    adapted = {name for name, module in encoder.named_modules() if hasattr(module, "lora_A")}
    names = ("attention.self.query", "attention.output.dense", "output.dense")
    assert adapted == {f"encoder.layer.{layer}.{name}" for layer in (0, 1) for name in names}
    with pytest.raises(
        ModelError, match=r"no linear layer of this bert encoder is called 'quary'; did you mean 'query'\? \(there are: dense, key"
    ):
        add_lora(tiny_encoder("bert", request), LoraSettings(target_modules=["quary"]), seed=0)


def test_first_values_depend_on_the_seed_alone(request: pytest.FixtureRequest) -> None:
    states = []
    for seed, noise in ((1, 5), (1, 6), (2, 6)):
        encoder = tiny_encoder("bert", request)
        torch.manual_seed(noise)
        add_lora(encoder, LORA, seed=seed)
        states.append({name: weight for name, weight in encoder.state_dict().items() if "lora_A" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("stage", [train_retriever, distill])
def test_a_stage_saves_a_model_as_any_other(inputs: dict[str, Path], tmp_path: Path, stage: Any) -> None:
    kind: Any = {"kind": DistillSettings} if stage is distill else {}
    made, start = context(tmp_path / "out"), context(tmp_path / "start")
    stage.run(retriever_settings(**kind, lora=LORA), inputs, made)
    stage.run(retriever_settings(**kind, training=training(max_steps=1, learning_rate=1e-12)), inputs, start)
    trained, fresh = weights(made.work), weights(start.work)
    assert trained.keys() == fresh.keys()
    changed = {name for name in trained if not torch.allclose(trained[name], fresh[name], atol=1e-6)}
    assert changed and all(name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight")) for name in changed)
    with quiet():
        SentenceTransformer(str(made.work), device="cpu").encode(["granite kettle"])


def test_a_reranker_trains_its_head_too(inputs: dict[str, Path], tmp_path: Path) -> None:
    shared: dict[str, Any] = {"initial": "start", "model": MODEL, "queries_per_step": 4, "group_size": 4, "max_pair_tokens": 64}
    made, start = context(tmp_path / "out"), context(tmp_path / "start")
    train_reranker.run(RerankerSettings(**shared, lora=LORA, training=training()), inputs, made)
    train_reranker.run(RerankerSettings(**shared, training=training(max_steps=1, learning_rate=1e-12)), inputs, start)
    trained, fresh = CrossEncoder.load(made.work).state_dict(), CrossEncoder.load(start.work).state_dict()
    assert trained.keys() == fresh.keys()
    changed = {name for name in trained if not torch.allclose(trained[name], fresh[name], atol=1e-6)}
    assert {"classifier.classifier.weight", "classifier.bert.pooler.dense.weight", "classifier.bert.pooler.dense.bias"} <= changed
    assert not any("embeddings" in name or "LayerNorm" in name for name in changed)


def test_a_killed_training_goes_on_to_the_same_bits(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = retriever_settings(lora=LORA.model_copy(update={"dropout": 0.1}), dropout=0.1)
    whole, killed = context(tmp_path / "whole"), context(tmp_path / "killed")
    train_retriever.run(settings, inputs, whole)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_seed", _stop_after(5, trainer.step_seed))
        with pytest.raises(KeyboardInterrupt):
            train_retriever.run(settings, inputs, killed)
    again = context(tmp_path / "killed")
    train_retriever.run(settings, inputs, again)
    expected = weights(whole.work)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again.work).items())


def test_two_processes_train_the_same_adapters(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = retriever_settings(lora=LORA, dropout=0.0, training=training(bf16=False, optim="sgd", learning_rate=0.5, max_grad_norm=1e9))
    alone = context(tmp_path / "alone")
    train_retriever.run(settings, inputs, alone)
    script = (
        "import json, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from simlm.recipe import RetrieverSettings; from simlm.runtime import join_processes; from simlm.stages import train_retriever\n"
        "from tests.unit.test_training_stages import context\n"
        "ranks = join_processes()\n"
        "made = context(Path(sys.argv[2]), rank=ranks.rank, num_ranks=ranks.num_ranks)\n"
        "settings = RetrieverSettings.model_validate_json(sys.argv[3])\n"
        "train_retriever.run(settings, {k: Path(v) for k, v in json.loads(sys.argv[4]).items()}, made)\n"
        "ranks.barrier()\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    context(tmp_path / "two")
    arguments = [
        str(Path(__file__).parents[2]),
        str(tmp_path / "two"),
        settings.model_dump_json(),
        json.dumps({k: str(v) for k, v in inputs.items()}),
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "script.py"),
        *arguments,
    ]
    done = subprocess.run(torchrun, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(alone.work), weights(tmp_path / ".two.work")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_without_peft_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "data", num_passages=12)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    changes = [*TINY, f"data.path={json.dumps(str(tmp_path / 'data'))}", f"output={json.dumps(str(tmp_path / 'run'))}"]
    with pytest.raises(MissingExtraError, match=r"\[distilled\] lora needs the library 'peft'.*pip install 'simlm\[lora\]'"):
        make_plan(load_recipe(RECIPE, [*changes, "distilled.lora={rank=4}"]))
    make_plan(load_recipe(RECIPE, [*changes, "distilled.lora={rank=4}", 'skip=["distilled"]']))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "retriever1.lora.rank"),
        ({"target_modules": []}, "retriever1.lora.target_modules"),
        ({"target_modules": "query"}, "retriever1.lora.target_modules"),
        ({"ranks": 3}, "did you mean 'rank'"),
    ],
)
def test_settings_that_are_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "x", "retriever1": {"lora": lora}})


def test_pooling_is_trained_with_and_saved(inputs: dict[str, Path], tmp_path: Path, tiny_store: Store) -> None:
    for pooling in ("cls", "mean"):
        made = context(tmp_path / pooling)
        model = MODEL.model_copy(update={"pooling": pooling})
        train_retriever.run(retriever_settings(model=model, training=training(max_steps=1)), inputs, made)
        assert BiEncoder.load(made.work).pooling == pooling
        assert json.loads((made.work / "1_Pooling" / "config.json").read_text())["pooling_mode"] == pooling
    assert len(tiny_store.passages) == 60
