"""The bi-encoder: one encoder for queries and passages, one vector of unit length each.

Saved as a sentence-transformers folder, so that SentenceTransformer(folder), AutoModel and simlm all load it. Passages with a title are
pairs `[CLS] title [SEP] text [SEP]`, which sentence-transformers takes as (title, text) tuples.
Shapes: B batch rows, T tokens, H hidden, D embedding dim (= H).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import write_json
from simlm.errors import ModelError
from simlm.models.backbone import load_encoder, quiet, resolve_model
from simlm.recipe import ModelSettings

SIMLM_FILE = "simlm.json"
Pooling = Literal["cls", "mean"]


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
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_BTH = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        # Pooling and length in fp32: at temperature 0.02 bf16's three digits are not enough.
        return F.normalize(pool(hidden_BTH, attention_mask, self.pooling).float(), dim=-1)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_query_tokens: int, max_passage_tokens: int) -> None:
        """Write a folder that SentenceTransformer, AutoModel and `load` read; its encode_query and encode_document use the two lengths."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.encoder.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            transformer = Transformer(
                str(folder), query_length=max_query_tokens, document_length=max_passage_tokens, max_seq_length=max_passage_tokens
            )
            modules = [transformer, PoolingModule(self.dim, self.pooling), Normalize()]
            model = SentenceTransformer(modules=modules, similarity_fn_name="cosine", device="cpu")
            model.save(str(folder), create_model_card=False)
        facts = {
            "role": "retriever",
            "pooling": self.pooling,
            "dim": self.dim,
            "max_query_tokens": max_query_tokens,
            "max_passage_tokens": max_passage_tokens,
        }
        write_json(folder / SIMLM_FILE, facts)

    @classmethod
    def load(cls, ref: str | Path | ModelSettings, *, pooling: Pooling | None = None, dropout: float | None = None) -> BiEncoder:
        """A retriever of ours, any sentence-transformers folder of the same build, or a bare encoder.

        pooling: none = the folder's own (simlm.json, or the pooling module that modules.json names), else that of the settings, else "cls".
        Raises ModelError if the folder is another role's, or pools in a way that is neither cls nor mean.
        """
        settings = ref if isinstance(ref, ModelSettings) else ModelSettings(start=str(ref))
        if settings.start == "scratch":
            raise ModelError('"scratch" has no weights to encode with; give a trained model')
        resolved = resolve_model(settings.start)
        folder = Path(resolved)
        role = str(read_simlm(folder).get("role", "retriever"))
        if role not in ("retriever", "pretrained"):
            raise ModelError(f"{folder}: this is a {role}, a retriever was expected; give the folder of a train_retriever or distill step")
        encoder = load_encoder(settings.model_copy(update={"start": resolved}), dropout=dropout)
        return cls(encoder, pooling or own_pooling(folder) or settings.pooling)


def pool(hidden_BTH: Tensor, attention_mask_BT: Tensor | None, pooling: Pooling) -> Tensor:
    """[B, H]: the first position's state, or the mean over the positions that are not padding."""
    if pooling == "cls":
        return hidden_BTH[:, 0]
    if attention_mask_BT is None:
        return hidden_BTH.float().mean(dim=1)
    mask_BT1 = attention_mask_BT.unsqueeze(-1).to(torch.float32)
    return (hidden_BTH.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1e-9)


def read_simlm(folder: Path) -> dict[str, Any]:
    """What simlm wrote about a model folder; empty for a folder of others (or a hub id)."""
    file = folder / SIMLM_FILE
    if not file.is_file():
        return {}
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); run the step that makes this model again") from None
    return facts


def own_pooling(folder: Path) -> Pooling | None:
    """The pooling that a folder declares, None where it declares none. ModelError for a pooling that we do not have."""
    declared = read_simlm(folder).get("pooling")
    if declared is None and (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        for module in modules:
            if module["type"].endswith("Pooling"):
                declared = _pooling_of(json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8")))
    if declared is None:
        return None
    if declared not in ("cls", "mean"):
        raise ModelError(f"{folder}: pools by {declared!r}; simlm has cls and mean: set model.pooling, and train")
    return cast("Pooling", declared)


def _pooling_of(config: dict[str, Any]) -> str:
    """sentence-transformers writes pooling_mode since 6.0, and one flag a mode before."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(mode)
    flags = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    active = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    return "+".join(flags.get(name, name.removeprefix("pooling_mode_")) for name in active)
