"""Sampling from the generator: the distribution is exact, and only masked positions change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from simlm.models.backbone import load_masked_lm
from simlm.objectives.generator import Generator, sample_tokens
from simlm.recipe import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)


@pytest.mark.parametrize("num_entries", [7, 128, 300, 384])
def test_distribution_is_exact(num_entries: int) -> None:
    """Chi-square over 20,000 draws, with and without a tail after whole blocks of 128."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_entries, generator=generator)
    num = 20_000
    excluded = torch.tensor([0, num_entries - 1])
    samples = sample_tokens(
        torch.ones(num, 1),
        logits[:, None] / 2,
        logits / 2,
        torch.rand(num, generator=generator),
        temperature=0.7,
        excluded=excluded,
        chunk_rows=999,
    )
    expected = torch.softmax(logits.double() / 0.7, 0)
    expected[excluded] = 0
    expected /= expected.sum()
    counts = np.bincount(samples.numpy(), minlength=num_entries)
    assert counts[excluded].sum() == 0 and len(counts) == num_entries
    kept = expected.numpy() > 0
    assert chisquare(counts[kept], num * expected.numpy()[kept]).pvalue > 1e-3


def test_evenly_spread_numbers_give_the_counts_themselves() -> None:
    # Probabilities 1/2, 0, 1/4, 1/4.
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0]).log()
    uniforms = (torch.arange(8) + 0.5) / 8
    samples = sample_tokens(torch.zeros(8, 1), torch.zeros(4, 1), logits, uniforms)
    assert samples.tolist() == [0, 0, 0, 0, 2, 2, 3, 3]


def test_the_ends_of_the_unit_interval() -> None:
    bias = torch.full((300,), -torch.inf)
    bias[[5, 290]] = 0.0
    ends = torch.tensor([0.0, 1.0 - 2**-24, 1.0])
    assert sample_tokens(torch.zeros(3, 1), torch.zeros(300, 1), bias, ends).tolist() == [5, 290, 290]
    one = torch.full((256,), -torch.inf)
    one[77] = 3.0
    assert sample_tokens(torch.zeros(3, 1), torch.zeros(256, 1), one, ends).tolist() == [77, 77, 77]
    assert sample_tokens(torch.zeros(0, 1), torch.zeros(256, 1), one, ends[:0]).shape == (0,)


def test_only_masked_positions_change(tiny_wordpiece: PreTrainedTokenizerFast) -> None:
    config = {"model_type": "electra", "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked_lm = load_masked_lm(ModelSettings(start="scratch", config=config | {"intermediate_size": 16}), tokenizer=tiny_wordpiece)
    generator = Generator(masked_lm, tiny_wordpiece)
    generator.train()
    assert not generator.masked_lm.training and not any(parameter.requires_grad for parameter in generator.parameters())
    ids = torch.randint(5, len(tiny_wordpiece), (3, 9))
    positions = torch.tensor([1, 4, 9 + 2, 18 + 8])
    uniforms = torch.rand(4)
    sampled, loss = generator.replace(ids, None, None, positions, uniforms)
    assert float(loss) == 0.0
    changed = (sampled != ids).flatten().nonzero().flatten().tolist()
    assert set(changed) <= set(positions.tolist())
    assert torch.equal(sampled, generator.replace(ids, None, None, positions, uniforms)[0])
    many = torch.stack([generator.replace(ids, None, None, positions, torch.rand(4))[0] for _ in range(300)])
    special = set(tiny_wordpiece.all_special_ids) - {tiny_wordpiece.unk_token_id}
    assert not special & set(many.flatten().tolist())
    assert len(set(many[:, 0, 1].tolist())) > 50  # an untrained generator spreads over the vocabulary
