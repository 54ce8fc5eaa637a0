"""The bi-encoder: one encoder for queries and passages, one vector of unit length each.

Saved as a sentence-transformers folder, so that SentenceTransformer(folder), AutoModel and simlm all load it. Passages with a title are
pairs `[CLS] title [SEP] text [SEP]`, which sentence-transformers takes as (title, text) tuples.
Shapes: B batch rows, T tokens, H hidden, D embedding dim (= H).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import disk_error, write_json
from simlm.errors import ModelError
from simlm.models.backbone import load_encoder, max_positions, quiet, takes_token_types
from simlm.models.direct_layers import first_states, has_direct_layers, last_states
from simlm.models.model_folder import SIMLM_FILE, Pooling, read_model_folder, save_tokenizer
from simlm.recipe import ModelSettings


class BiEncoder(nn.Module):
    """Token tensors -> vectors of unit length; the same weights for queries and passages."""

    def __init__(self, encoder: PreTrainedModel, pooling: Pooling = "cls") -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling: Pooling = pooling

    @property
    def dim(self) -> int:
        return int(self.encoder.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """float32 [B, D], unit length. attention_mask None means that no row is padded (mean pooling then takes every position)."""
        direct = has_direct_layers(self.encoder)
        if direct and self.pooling == "cls":
            pooled_BH = first_states(self.encoder, input_ids, attention_mask, token_type_ids)
        elif direct and not self.encoder.training:
            pooled_BH = pool(last_states(self.encoder, input_ids, attention_mask, token_type_ids), attention_mask, self.pooling)
        else:
            types = {"token_type_ids": token_type_ids} if takes_token_types(self.encoder) else {}
            hidden_BTH = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
            pooled_BH = pool(hidden_BTH, attention_mask, self.pooling)
        # Pooling and length in fp32: at temperature 0.02 bf16's three digits are not enough.
        return F.normalize(pooled_BH.float(), dim=-1)

    def save(
        self,
        folder: Path | str,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_query_tokens: int,
        max_passage_tokens: int,
        query_prompt: str = "",
        passage_prompt: str = "",
        matryoshka: Sequence[int] = (),
    ) -> None:
        """Write a folder that SentenceTransformer, AutoModel and `load` read.

        Its encode_query and encode_document use the two lengths and put the two prompts before each text.
        matryoshka: sizes to which its vectors may be cut, for whoever reads simlm.json.
        Raises ModelError if a length is more than the encoder has positions, DiskError if the folder cannot be written.
        """
        folder = Path(folder)
        check_positions(self.encoder, max(max_query_tokens, max_passage_tokens), str(folder))
        facts = {
            "role": "retriever",
            "pooling": self.pooling,
            "dim": self.dim,
            "max_query_tokens": max_query_tokens,
            "max_passage_tokens": max_passage_tokens,
            "query_prompt": query_prompt,
            "passage_prompt": passage_prompt,
            "matryoshka": list(matryoshka),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                self.encoder.save_pretrained(folder)
                save_tokenizer(folder, tokenizer, token_types=takes_token_types(self.encoder))
                prompts = {"query": query_prompt, "document": passage_prompt}
                self._save_modules(folder, max_query_tokens, max_passage_tokens, prompts)
            write_json(folder / SIMLM_FILE, facts)
        except OSError as error:
            raise disk_error(error, folder) from error

    def _save_modules(self, folder: Path, max_query_tokens: int, max_passage_tokens: int, prompts: dict[str, str]) -> None:
        """Let sentence-transformers write its own files: what it writes it reads."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

        transformer = Transformer(
            str(folder), query_length=max_query_tokens, document_length=max_passage_tokens, max_seq_length=max_passage_tokens
        )
        modules = [transformer, PoolingModule(self.dim, self.pooling), Normalize()]
        model = SentenceTransformer(modules=modules, similarity_fn_name="cosine", device="cpu", prompts=prompts)
        model.save(str(folder), create_model_card=False)

    @classmethod
    def load(cls, ref: str | Path | ModelSettings, *, pooling: Pooling | None = None, dropout: float | None = None) -> BiEncoder:
        """A retriever of ours, any sentence-transformers folder of the same build, or a bare encoder.

        pooling: none = the folder's own (simlm.json, or the pooling module that modules.json names), else that of the settings, else "cls".
        Raises ModelError if the folder is another role's, or pools in a way that is neither cls nor mean.
        """
        settings = ref if isinstance(ref, ModelSettings) else ModelSettings(start=str(ref))
        if settings.start == "scratch":
            raise ModelError('"scratch" has no weights to encode with; give a trained model')
        if pooling is None:
            found = read_model_folder(settings.start, settings.revision)
            if found.role in ("reranker", "generator"):
                raise ModelError(
                    f"{settings.start}: this is a {found.role}, a retriever was expected; give the folder of train_retriever or distill"
                )
            pooling = found.pooling or settings.pooling
        return cls(load_encoder(settings, dropout=dropout), pooling)


def check_positions(model: PreTrainedModel, num_tokens: int, where: str) -> None:
    """ModelError if a sequence of `num_tokens` is longer than what the model has positions for."""
    positions = max_positions(model)
    if positions is not None and num_tokens > positions:
        raise ModelError(f"{where}: sequences of up to {num_tokens} tokens, but the model has {positions} positions; lower the maximum")


def pool(hidden_BTH: Tensor, attention_mask_BT: Tensor | None, pooling: Pooling) -> Tensor:
    """[B, H]: the first position's state, or the mean over the positions that are not padding."""
    if pooling == "cls":
        return hidden_BTH[:, 0]
    if attention_mask_BT is None:
        return hidden_BTH.float().mean(dim=1)
    mask_BT1 = attention_mask_BT.unsqueeze(-1).to(torch.float32)
    return (hidden_BTH.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1e-9)
