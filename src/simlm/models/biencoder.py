"""The bi-encoder: one encoder for queries and passages, a text's vector is its pooled last layer at unit length.

Source: SimLM, arXiv 2207.02578, section 3.1 (the `[CLS]` state); mean pooling is for checkpoints that were trained with it.
Shapes: B rows, T tokens, H hidden, D embedding dim (= H).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import disk_error
from simlm.errors import ModelError
from simlm.models.backbone import load_encoder, max_positions, quiet, takes_token_types
from simlm.models.model_folder import Pooling, read_model_folder, save_tokenizer, write_retriever_files
from simlm.recipe import ModelSettings


class BiEncoder(nn.Module):
    """An encoder with pooling. `pooling`: "cls" (the paper's) or "mean" (over all tokens that are not padding)."""

    def __init__(self, encoder: PreTrainedModel, pooling: Pooling = "cls") -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ModelError(f"pooling {pooling!r}: cls or mean was expected")
        self.encoder = encoder
        self.pooling: Pooling = pooling

    @property
    def dim(self) -> int:
        """Length D of a vector."""
        return int(self.encoder.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Vectors of unit length, float32 [B, D].

        input_ids: int64 [B, T], padded on the right. attention_mask: 1 = token; None = no padding anywhere, which is faster.
        token_type_ids: None = all 0; ignored in families without segments.
        """
        types = {"token_type_ids": token_type_ids} if takes_token_types(self.encoder) else {}
        hidden_BTH = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        return nn.functional.normalize(pool(hidden_BTH, attention_mask, self.pooling), dim=-1)

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerFast, *, max_query_tokens: int, max_passage_tokens: int) -> None:
        """Write a folder that simlm, SentenceTransformer(folder) and AutoModel load, with equal vectors.

        sentence-transformers has one maximum, which is `max_passage_tokens`; a longer query is cut at `max_query_tokens` by simlm only.
        Raises ModelError if a maximum is more than the encoder has positions, DiskError if the folder cannot be written.
        """
        folder = Path(folder)
        positions = max_positions(self.encoder)
        longest = max(max_query_tokens, max_passage_tokens)
        if positions is not None and longest > positions:
            raise ModelError(
                f"{folder}: texts of up to {longest} tokens, but the encoder has {positions} positions; prepare with shorter ones"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                self.encoder.save_pretrained(str(folder))
            save_tokenizer(folder, tokenizer, max_tokens=max_passage_tokens, token_types=takes_token_types(self.encoder))
            write_retriever_files(
                folder, pooling=self.pooling, dim=self.dim, max_query_tokens=max_query_tokens, max_passage_tokens=max_passage_tokens
            )
        except OSError as error:
            raise disk_error(error, folder) from error

    @classmethod
    def load(
        cls,
        ref: str | Path | None = None,
        *,
        pooling: Pooling | None = None,
        dropout: float | None = None,
        settings: ModelSettings | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> BiEncoder:
        """A bi-encoder over any encoder checkpoint: a saved retriever, a pre-trained folder, a packaged or hub model.

        ref: None = `settings.start`. settings: revision, attention and, for "scratch", the configuration.
        pooling: None = what the folder says of itself (simlm.json, modules.json), "cls" where it says nothing.
        dropout: None = the checkpoint's own. seed, tokenizer: for "scratch" (vocabulary and special tokens).
        Raises ModelError if there is no such checkpoint or its pooling is neither cls nor mean.
        """
        settings = settings or ModelSettings()
        if ref is not None:
            settings = settings.model_copy(update={"start": str(ref)})
        if pooling is None and settings.start != "scratch":
            pooling = read_model_folder(settings.start, settings.revision).pooling
        return cls(load_encoder(settings, seed=seed, dropout=dropout, tokenizer=tokenizer), pooling or "cls")


def pool(hidden_BTH: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One float32 vector a row, [B, H]: the first token's, or the mean over the tokens of the mask."""
    if pooling == "cls":
        return hidden_BTH[:, 0].float()
    if attention_mask is None:
        return hidden_BTH.float().mean(dim=1)
    weights_BT1 = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden_BTH.float() * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1).clamp(min=1e-9)
