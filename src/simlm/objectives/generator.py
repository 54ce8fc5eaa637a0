"""The masked language model that proposes replacements, and exact sampling from it at low cost.

Source: SimLM, arXiv 2207.02578, section 3.1: an ELECTRA generator, frozen, temperature 1, masked positions only; trained along (weight
0.2): method.md section 1. That the encoder itself can take its place is ours.
Differs: special tokens are never sampled, so no [MASK], [PAD] or [SEP] can stand inside a passage; the generator never drops out.
Shapes: B passages, T tokens, M masked positions, H width of the output embeddings, V vocabulary, W = V padded to K blocks of COLUMNS,
C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.errors import ModelError
from simlm.losses.language_model import COLUMNS, chunked_cross_entropy, default_chunk_rows, padded_probabilities
from simlm.models.backbone import embed, encoder_of, layer_inputs, lm_features, load_masked_lm, load_tokenizer, run_encoder


class Generator(nn.Module):
    """A masked language model that proposes a token for each masked position; frozen unless `trained`."""

    never_sampled: Tensor

    def __init__(
        self, masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, temperature: float = 1.0, trained: bool = False
    ) -> None:
        super().__init__()
        self.masked_lm = masked_lm.requires_grad_(trained)
        self.trained = trained
        self.temperature = temperature
        self.mask_token_id = require_mask_token(tokenizer)
        self.num_tokens = len(tokenizer)
        # Unknown words are part of the text, all other special tokens are not.
        special = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        self.register_buffer("never_sampled", torch.tensor(special, dtype=torch.int64), persistent=False)
        self.train(False)

    @classmethod
    def load(cls, ref: str, tokenizer: PreTrainedTokenizerFast, *, temperature: float = 1.0, trained: bool = False) -> Generator:
        """Load a folder or hub id; ModelError if its vocabulary is not that of `tokenizer`, the encoder's."""
        check_same_vocabulary(ref, tokenizer)
        return cls(load_masked_lm(ref, vocab_size=len(tokenizer)), tokenizer, temperature=temperature, trained=trained)

    def train(self, mode: bool = True) -> Generator:
        """Stays in eval mode: samples and, where it is trained, its loss are those of the model without dropout."""
        return super().train(False)

    def replace(
        self,
        input_ids_BT: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        positions_M: Tensor,
        uniforms_M: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(input_ids_BT with the tokens at positions_M (flat, b * T + t) replaced by samples, its own masked-LM loss there).

        The model sees [MASK] at all of positions_M. uniforms_M: in [0, 1), one a position; the sample depends on nothing else.
        The loss is a sum in nats, with gradient if the generator is trained and 0 if it is not.
        """
        masked_BT = input_ids_BT.flatten().index_fill(0, positions_M, self.mask_token_id).view_as(input_ids_BT)
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            encoder = encoder_of(self.masked_lm)
            hidden_BTH = embed(encoder, masked_BT, token_type_ids)
            hidden_BTH = run_encoder(encoder, hidden_BTH, layer_inputs(encoder, hidden_BTH, attention_mask))
            features_MH, weight_VH, bias_V = lm_features(self.masked_lm, hidden_BTH.flatten(0, 1).index_select(0, positions_M))
            loss = torch.zeros((), device=input_ids_BT.device)
            if self.trained:
                loss = chunked_cross_entropy(features_MH, weight_VH, bias_V, input_ids_BT.flatten().index_select(0, positions_M))
        samples_M = sample_tokens(
            features_MH.detach(),
            weight_VH[: self.num_tokens],
            None if bias_V is None else bias_V[: self.num_tokens],
            uniforms_M,
            temperature=self.temperature,
            excluded=self.never_sampled,
        )
        return input_ids_BT.flatten().index_copy(0, positions_M, samples_M).view_as(input_ids_BT), loss


class SelfGenerator(Generator):
    """A frozen copy of the encoder and its head, taken anew from time to time."""

    def __init__(self, masked_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, temperature: float = 1.0) -> None:
        """masked_lm: a copy of its own."""
        super().__init__(masked_lm, tokenizer, temperature=temperature)
        self._refreshed = -1

    @torch.no_grad()
    def refresh(self, masked_lm: PreTrainedModel, step: int) -> None:
        """Take over the weights of `masked_lm` as they are before `step`, once a step."""
        if step == self._refreshed:
            return
        for own, theirs in zip(self.masked_lm.parameters(), masked_lm.parameters(), strict=True):
            own.copy_(theirs)
        self._refreshed = step


@torch.no_grad()
def sample_tokens(
    features_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    uniforms_M: Tensor,
    *,
    temperature: float = 1.0,
    excluded: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """samples_M int64, each drawn from softmax((features_MH @ weight_VH.T + bias_V) / temperature).

    Inverts the cumulative distribution at the row's uniform number, so one random number a row is enough and the sample is exact.
    The search goes over blocks first: adding up blocks and searching in one costs a fraction of a cumulative sum over all V.
    excluded: token ids that get probability 0, the others' being scaled up.
    """
    rows = chunk_rows or default_chunk_rows(weight_VH)
    samples = [
        _invert(padded_probabilities(features_CH, weight_VH, bias_V, temperature=temperature), uniforms_C, excluded)
        for features_CH, uniforms_C in zip(torch.split(features_MH, rows), torch.split(uniforms_M, rows), strict=True)
    ]
    return torch.cat(samples) if samples else torch.zeros(0, dtype=torch.int64, device=features_MH.device)


def _invert(probabilities_CW: Tensor, uniforms_C: Tensor, excluded: Tensor | None) -> Tensor:
    """First column whose cumulative probability is above uniform x total; never one of probability 0."""
    if excluded is not None:
        probabilities_CW.index_fill_(1, excluded, 0.0)
    num_rows = len(probabilities_CW)
    blocks_CKB = probabilities_CW.view(num_rows, probabilities_CW.shape[1] // COLUMNS, COLUMNS)
    cumulative_CK = blocks_CKB.sum(-1).cumsum(1)
    target_C1 = _below(uniforms_C.float()[:, None] * cumulative_CK[:, -1:], cumulative_CK[:, -1:])
    block_C1 = (cumulative_CK <= target_C1).sum(1, keepdim=True)
    before_C1 = torch.where(block_C1 > 0, cumulative_CK.gather(1, (block_C1 - 1).clamp_min(0)), 0.0)

    inside_CB = blocks_CKB[torch.arange(num_rows, device=blocks_CKB.device), block_C1[:, 0]]
    cumulative_CB = inside_CB.cumsum(1)
    rest_C1 = _below(target_C1 - before_C1, cumulative_CB[:, -1:])
    return block_C1[:, 0] * COLUMNS + (cumulative_CB <= rest_C1).sum(1)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """`value`, but under `limit`: sums of floats in two orders differ in the last digit, and the search must not run off the end."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def require_mask_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the mask token; ModelError if the tokenizer has none."""
    token_id = tokenizer.mask_token_id
    if token_id is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no mask token, which pre-training and its generator need; "
            'choose a masked language model\'s tokenizer, or skip = ["pretrain"]'
        )
    return int(token_id)


def check_same_vocabulary(ref: str, tokenizer: PreTrainedTokenizerFast, *, role: str = "generator", revision: str | None = None) -> None:
    """ModelError, naming both, unless the tokenizer of model `ref` has exactly the vocabulary of `tokenizer`, the store's."""
    theirs, ours = load_tokenizer(ref, revision).get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    different = [token for token in ours.keys() | theirs.keys() if theirs.get(token) != ours.get(token)]
    example = min(different, key=lambda token: (ours.get(token, len(ours)), token))
    advice = {
        "generator": 'Take a generator with the same vocabulary, or generator.source = "train"',
        "model": "Set prepare.tokenizer to this model, so that the corpus is tokenised with its own vocabulary",
    }
    raise ModelError(
        f"the {role} {ref} has another vocabulary ({len(theirs):,} entries) than the encoder's tokenizer, which made the store "
        f"({tokenizer.name_or_path}, {len(ours):,} entries): {len(different):,} differ, first {example!r}, "
        f"id {theirs.get(example)} there and {ours.get(example)} here. {advice[role]}"
    )
