"""Layers as plain operations, the last one for the first position alone: same states, same gradients as transformers' encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simlm.models.backbone import encoder_of, load_classifier, load_encoder, set_dropout
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.models.direct_layers import FAMILIES, first_states, has_direct_layers, last_states
from simlm.recipe import ModelSettings

SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 24}


def fresh(model_type: str, **fields: object) -> torch.nn.Module:
    extra = {"embedding_size": 8} if model_type == "electra" else {}
    config = {"model_type": model_type, "vocab_size": 40, **SHAPE, **extra, **fields}
    return load_encoder(ModelSettings(start="scratch", config=config), seed=3)


def batch(model_type: str, *, padded: bool) -> dict[str, Tensor | None]:
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 4:] = 0
        mask[2, 1:] = 0
        ids = torch.where(mask.bool(), ids, torch.ones_like(ids))
    return {
        "input_ids": ids,
        "attention_mask": mask if padded else None,
        "token_type_ids": torch.zeros_like(ids) if model_type in ("bert", "electra") else None,
    }


def whole(encoder: torch.nn.Module, tensors: dict[str, Tensor | None]) -> Tensor:
    state: Tensor = encoder(**{name: value for name, value in tensors.items() if value is not None}).last_hidden_state[:, 0]
    return state


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_state_and_gradients_are_those_of_the_whole_encoder(model_type: str, layers: int, attention: str, padded: bool) -> None:
    encoder = fresh(model_type, num_hidden_layers=layers).double()
    encoder.config._attn_implementation = attention
    encoder.train()
    set_dropout(encoder, 0.0)
    tensors = batch(model_type, padded=padded)
    results = []
    for states in (whole(encoder, tensors), first_states(encoder, **tensors)):
        encoder.zero_grad()
        (states * torch.arange(16.0, dtype=torch.float64)).sum().backward()
        results.append((states.detach(), {name: value.grad for name, value in encoder.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-12)
    for name, gradient in results[0][1].items():
        ours = results[1][1][name]
        if gradient is None or ours is None:
            assert gradient is None and ours is None, name
        else:
            torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_states_in_evaluation_are_those_of_the_whole_encoder(model_type: str, activation: str, padded: bool) -> None:
    encoder = fresh(model_type, hidden_act=activation).double().eval()
    tensors = batch(model_type, padded=padded)
    named = {name: value for name, value in tensors.items() if value is not None}
    with torch.inference_mode():
        wanted = encoder(**named).last_hidden_state
        found = last_states(encoder, **tensors)
        first = first_states(encoder, **tensors)
    kept = torch.ones(found.shape[:2], dtype=torch.bool) if tensors["attention_mask"] is None else tensors["attention_mask"].bool()
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first, wanted[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_gradients_of_a_crossencoder_are_those_of_the_whole_classifier(model_type: str, training: bool) -> None:
    extra = {"embedding_size": 8} if model_type == "electra" else {}
    config = {"model_type": model_type, "vocab_size": 40, **SHAPE, **extra}
    model = CrossEncoder(load_classifier(ModelSettings(start="scratch", config=config), seed=3)).train(training)
    set_dropout(model, 0.0)
    tensors = batch(model_type, padded=True)
    assert has_direct_layers(encoder_of(model.classifier))
    named = {name: value for name, value in tensors.items() if value is not None}
    results = []
    for logits in (model(**tensors), model.classifier(**named).logits[:, 0]):
        model.zero_grad()
        (logits * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        results.append((logits.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_is_applied_in_training_only() -> None:
    encoder = fresh("bert")
    tensors = batch("bert", padded=True)
    set_dropout(encoder, 0.0)
    layer = encoder.encoder.layer[-1]
    for path in ("attention.self.dropout", "attention.output.dropout", "output.dropout"):
        layer.get_submodule(path).p = 0.5
        encoder.train()
        torch.manual_seed(1)
        first, second = first_states(encoder, **tensors), first_states(encoder, **tensors)
        assert not torch.equal(first, second), path
        encoder.eval()
        torch.testing.assert_close(first_states(encoder, **tensors), whole(encoder, tensors), rtol=1e-5, atol=1e-6)
        layer.get_submodule(path).p = 0.0


def test_other_architectures_and_poolings_go_the_whole_way() -> None:
    assert has_direct_layers(fresh("bert"))
    distilbert = {"model_type": "distilbert", "vocab_size": 40, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    assert not has_direct_layers(load_encoder(ModelSettings(start="scratch", config=distilbert)))
    decoder = fresh("bert")
    decoder.config.is_decoder = True
    assert not has_direct_layers(decoder)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_biencoder_pools_what_the_encoder_gives(pooling: str) -> None:
    encoder = fresh("bert").eval()
    tensors = batch("bert", padded=True)
    vectors = BiEncoder(encoder, pooling)(**tensors)
    hidden = encoder(**tensors).last_hidden_state
    mask = tensors["attention_mask"][:, :, None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(pooled, dim=-1), rtol=1e-5, atol=1e-6)
