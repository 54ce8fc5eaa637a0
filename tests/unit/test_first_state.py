"""The shortcut through the last layer: same state, same gradients as the whole encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simlm.models.backbone import load_encoder, set_dropout
from simlm.models.biencoder import BiEncoder
from simlm.models.first_state import FAMILIES, first_states, has_shortcut
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
    assert has_shortcut(fresh("bert"))
    distilbert = {"model_type": "distilbert", "vocab_size": 40, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    assert not has_shortcut(load_encoder(ModelSettings(start="scratch", config=distilbert)))
    decoder = fresh("bert")
    decoder.config.is_decoder = True
    assert not has_shortcut(decoder)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_biencoder_pools_what_the_encoder_gives(pooling: str) -> None:
    encoder = fresh("bert").eval()
    tensors = batch("bert", padded=True)
    vectors = BiEncoder(encoder, pooling)(**tensors)
    hidden = encoder(**tensors).last_hidden_state
    mask = tensors["attention_mask"][:, :, None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(pooled, dim=-1), rtol=1e-5, atol=1e-6)
