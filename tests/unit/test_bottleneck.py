"""Nothing but [CLS] connects encoder and decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from simlm.errors import ModelError
from simlm.models.backbone import embed, encoder_of, layer_inputs, layers_of, load_masked_lm, run_encoder
from simlm.objectives.bottleneck import Decoder
from simlm.recipe import ModelSettings
from tests.unit.test_backbone import CONFIGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

torch.set_num_threads(1)


class Both(torch.nn.Module):
    """Encoder and decoder as `Pretraining` and `ReplacedLM` run them."""

    def __init__(self, masked_lm: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        self.masked_lm = masked_lm
        self.decoder = Decoder(masked_lm, num_layers)

    def forward(self, encoder_ids: torch.Tensor, decoder_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = encoder_of(self.masked_lm)
        hidden = embed(encoder, encoder_ids)
        inputs = layer_inputs(encoder, hidden, None)
        hidden = run_encoder(encoder, hidden, inputs)
        return hidden, self.decoder(hidden[:, 0], embed(encoder, decoder_ids), inputs)


def bottleneck(family: str, num_decoder_layers: int = 2) -> Both:
    settings = ModelSettings(start="scratch", config=CONFIGS[family])
    return Both(load_masked_lm(settings, vocab_size=60, dropout=0.0), num_decoder_layers)


@pytest.mark.parametrize("family", CONFIGS)
def test_only_cls_reaches_the_decoder(family: str) -> None:
    model = bottleneck(family)
    encoder_ids, decoder_ids = torch.randint(5, 60, (2, 3, 11))
    encoder_hidden, decoder_hidden = model(encoder_ids, decoder_ids)
    encoder_hidden.retain_grad()
    (decoder_hidden[:, 1:] ** 2).sum().backward()
    gradient = encoder_hidden.grad
    assert gradient is not None
    assert (gradient[:, 0].abs().sum(-1) > 0).all()
    assert (gradient[:, 1:] == 0).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_decoder_depends_on_the_encoder_through_its_cls_vector_alone(family: str) -> None:
    """Two encoder inputs with (forced) equal [CLS] states give equal decoder outputs; gradients to the encoder's layers exist."""
    model = bottleneck(family)
    first, second, decoder_ids = torch.randint(5, 60, (3, 2, 9))
    layer = layers_of(encoder_of(model.masked_lm))[-1]

    def same_cls(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.linspace(-1, 1, output.shape[-1]).expand_as(output[:, :1]), output[:, 1:]], 1)

    different = model(first, decoder_ids)[1], model(second, decoder_ids)[1]
    assert not torch.allclose(*different)
    handle = layer.register_forward_hook(same_cls)
    (encoder_one, decoder_one), (encoder_two, decoder_two) = model(first, decoder_ids), model(second, decoder_ids)
    handle.remove()
    assert not torch.allclose(encoder_one, encoder_two)
    torch.testing.assert_close(decoder_one, decoder_two, rtol=0, atol=0)
    model(first, decoder_ids)[1].sum().backward()
    assert all(parameter.grad is not None for parameter in layers_of(encoder_of(model.masked_lm)).parameters())


def test_windowed_layers_of_a_decoder_see_everything() -> None:
    """ModernBERT's local layers reach a few tokens only; as decoder layers they must reach [CLS] from any place."""
    settings = ModelSettings(start="scratch", config=CONFIGS["modernbert"] | {"local_attention": 4, "global_attn_every_n_layers": 99})
    model = Both(load_masked_lm(settings, vocab_size=60, dropout=0.0), 1)
    encoder_hidden, decoder_hidden = model(*torch.randint(5, 60, (2, 1, 30)))
    (gradient,) = torch.autograd.grad(decoder_hidden[0, -1, 0], encoder_hidden)
    assert gradient[0, 0].abs().sum() > 0


def test_position_0_of_the_decoder_input_is_not_its_own_token() -> None:
    model = bottleneck("bert")
    ids = torch.randint(5, 60, (1, 7))
    other = ids.clone()
    other[0, 0] = 4
    torch.testing.assert_close(model(ids, ids)[1], model(ids, other)[1], rtol=0, atol=0)


def test_starts_from_copies_of_the_last_layers_and_shares_the_rest() -> None:
    model = bottleneck("bert")
    layers = layers_of(encoder_of(model.masked_lm))
    for own, source in zip(model.decoder.parameters(), layers[-2:].parameters(), strict=True):
        assert torch.equal(own, source) and own is not source
    names = {name for name, _ in model.named_parameters()}
    assert not any("embeddings" in name for name in names if name.startswith("decoder"))
    with pytest.raises(ModelError, match="decoder_layers"):
        bottleneck("bert", 9)
