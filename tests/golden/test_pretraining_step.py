"""One pre-training step against the plain algorithm, written out loop by loop: a passage at a time, all logits, no chunks, no batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from simlm.data.batches import TokenBatch, collate
from simlm.models.backbone import encoder_of, load_masked_lm
from simlm.objectives.bottleneck import Decoder
from simlm.objectives.generator import Generator
from simlm.objectives.masking import Draws
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.replaced_lm import ReplacedLM
from simlm.objectives.steps import Feeding
from simlm.objectives.views import PretrainViews
from simlm.recipe import ModelSettings
from tests.conftest import build_store, tiny_passages

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 70,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.5,
}
ROWS = np.array([0, 5, 11, 17, 23, 44])
SEED, EPOCH = 7, 2


@pytest.mark.parametrize(("family", "fixture"), [("bert", "tiny_wordpiece"), ("roberta", "tiny_bpe")])
def test_one_step_equals_the_plain_algorithm(family: str, fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(fixture)
    store = build_store(tmp_path / "store", tokenizer, tiny_passages(), [], {})
    config = {"model_type": family, **SHAPE}
    masked_lm = load_masked_lm(ModelSettings(start="scratch", config=config), tokenizer=tokenizer, seed=1)
    small = load_masked_lm(ModelSettings(start="scratch", config=config | {"num_hidden_layers": 1}), tokenizer=tokenizer, seed=2)
    objective = Pretraining(
        masked_lm,
        {"replaced_lm": ReplacedLM(Decoder(masked_lm))},
        mask_token_id=int(tokenizer.mask_token_id),
        views=PretrainViews(0.3, 0.5, sampled=True),
        generator=Generator(small, tokenizer, temperature=1.3),
    )
    feeding = Feeding(store.passages, objective.views(), 150, token_types=family == "bert", seed=SEED)

    micro_batches = feeding.micro_batches(ROWS, np.full(len(ROWS), EPOCH))
    assert len(micro_batches) > 1 and any("attention_mask" in micro_batch for micro_batch in micro_batches)
    outputs = [objective(**micro_batch) for micro_batch in micro_batches]
    loss = sum((output["loss"] for output in outputs), torch.zeros(()))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}

    objective.zero_grad()
    plain, replaced = plain_step(objective, [collate(store.passages, [row]) for row in ROWS], tokenizer)
    plain["loss"].backward()
    for name in ("loss", "encoder_loss", "decoder_loss"):
        torch.testing.assert_close(sum(output[name] for output in outputs), plain[name], rtol=1e-5, atol=1e-5)
    for name in ("encoder_replaced", "decoder_replaced"):
        assert float(sum(output[name] for output in outputs)) == pytest.approx(replaced[name], rel=1e-5)
    for name, parameter in objective.named_parameters():
        if parameter.grad is None:
            assert name not in gradients and name.startswith("generator."), name
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def plain_step(
    objective: Pretraining, passages: list[TokenBatch], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Losses of the method's section 1 over single passages, and the share of tokens that were replaced by another."""
    encoder_sum, decoder_sum, num_tokens = torch.zeros(()), torch.zeros(()), 0
    changed = {"encoder_replaced": 0, "decoder_replaced": 0}
    for row, batch in zip(ROWS, passages, strict=True):
        draws = Draws(SEED, EPOCH, np.array([row]))
        width = batch.input_ids.shape[1]
        orders = [draws.uniforms(stream, width)[0] for stream in range(4)]
        encoder_mask = plain_mask(batch, 0.3, orders[0])
        decoder_mask = encoder_mask | plain_mask(batch, (0.5 - 0.3) / (1 - 0.3), orders[1])
        types = None if batch.token_type_ids is None else torch.from_numpy(batch.token_type_ids)
        ids = torch.from_numpy(batch.input_ids)
        encoder_ids = plain_replace(objective.generator, ids, types, encoder_mask, orders[2], tokenizer)
        decoder_ids = plain_replace(objective.generator, ids, types, decoder_mask, orders[3], tokenizer)

        masked_lm = objective.masked_lm
        extra = {} if types is None else {"token_type_ids": types}
        output = masked_lm(input_ids=encoder_ids, output_hidden_states=True, **extra)
        embedded = encoder_of(masked_lm).embeddings(input_ids=decoder_ids, **extra)
        hidden = torch.cat([output.hidden_states[-1][:, :1], embedded[:, 1:]], dim=1)
        for layer in objective.objectives.replaced_lm.decoder.layers:
            hidden = layer(hidden)
        decoder_logits = head(masked_lm)(hidden)
        for position in range(width):
            if batch.special[0, position]:
                continue
            num_tokens += 1
            encoder_sum = encoder_sum + cross_entropy(output.logits[0, position], ids[0, position])
            decoder_sum = decoder_sum + cross_entropy(decoder_logits[0, position], ids[0, position])
            changed["encoder_replaced"] += int(encoder_ids[0, position] != ids[0, position])
            changed["decoder_replaced"] += int(decoder_ids[0, position] != ids[0, position])
    encoder_loss, decoder_loss = encoder_sum / num_tokens, decoder_sum / num_tokens
    losses = {"loss": encoder_loss + decoder_loss, "encoder_loss": encoder_loss, "decoder_loss": decoder_loss}
    return losses, {name: count / num_tokens for name, count in changed.items()}


def head(masked_lm: nn.Module) -> nn.Module:
    return masked_lm.cls if hasattr(masked_lm, "cls") else masked_lm.lm_head


def plain_mask(batch: TokenBatch, rate: float, order: np.ndarray) -> np.ndarray:
    """Positions of one passage that are masked: words in the order of their random number, while they fit the budget."""
    words: list[list[int]] = []
    for position in range(batch.input_ids.shape[1]):
        if batch.special[0, position]:
            continue
        if batch.word_starts[0, position]:
            words.append([])
        words[-1].append(position)
    left = max(1, round(rate * sum(len(word) for word in words)))
    mask = np.zeros(batch.input_ids.shape[1], dtype=bool)
    for number in sorted(range(len(words)), key=lambda number: order[number]):
        if len(words[number]) <= left:
            mask[words[number]] = True
            left -= len(words[number])
    return mask


def plain_replace(
    generator: Generator, ids: Tensor, types: Tensor | None, mask: np.ndarray, uniforms: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> Tensor:
    """All logits of the generator, then the inverse of each masked position's cumulative distribution."""
    shown, replaced = ids.clone(), ids.clone()
    shown[0, torch.from_numpy(mask)] = tokenizer.mask_token_id
    extra = {} if types is None else {"token_type_ids": types}
    with torch.no_grad():
        logits = generator.masked_lm(input_ids=shown, **extra).logits[0].double() / 1.3
    for token_id in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
        logits[:, token_id] = -torch.inf
    for position in np.flatnonzero(mask):
        cumulative = np.cumsum(torch.softmax(logits[position], 0).numpy())
        replaced[0, position] = int(np.searchsorted(cumulative, uniforms[position], side="right"))
    return replaced
