"""The cross-encoder: query and passage in one sequence, one raw logit. Saved as what sentence-transformers' CrossEncoder loads.

Shapes: B pairs, T tokens.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import write_json
from simlm.errors import ModelError
from simlm.models.backbone import load_classifier, quiet, resolve_model
from simlm.models.biencoder import SIMLM_FILE, read_simlm
from simlm.recipe import ModelSettings


class CrossEncoder(nn.Module):
    """Token tensors of pairs -> one logit each, not squashed: teacher scores stay raw (method.md section 2)."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        if classifier.config.num_labels != 1:
            raise ModelError(
                f"a re-ranker has one label, this checkpoint has {classifier.config.num_labels}; start from an encoder without a head"
            )
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """float32 [B]: the higher the more relevant; comparable within a query only."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits_B1: Tensor = self.classifier(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits_B1.squeeze(-1).float()

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_pair_tokens: int) -> None:
        """Write a folder that CrossEncoder (raw logits), AutoModelForSequenceClassification, AutoModel and `load` read."""
        from sentence_transformers import CrossEncoder as SentenceCrossEncoder
        from torch.nn import Identity

        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.classifier.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model = SentenceCrossEncoder(str(folder), max_length=max_pair_tokens, activation_fn=Identity(), device="cpu")
            model.save_pretrained(str(folder), create_model_card=False)
        write_json(folder / SIMLM_FILE, {"role": "reranker", "max_pair_tokens": max_pair_tokens})

    @classmethod
    def from_encoder(
        cls,
        ref: str | ModelSettings,
        *,
        seed: int = 0,
        dropout: float | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> CrossEncoder:
        """A re-ranker to train: the checkpoint's encoder with its own one-label head, or a fresh one drawn from `seed`.

        A head over more labels (a classifier of something else) is a ModelError.
        """
        return cls(load_classifier(ref, seed=seed, dropout=dropout, tokenizer=tokenizer))

    @classmethod
    def load(cls, folder: str | Path) -> CrossEncoder:
        """A trained re-ranker, ours or another one-label cross-encoder. ModelError if the folder is another role's."""
        resolved = resolve_model(str(folder))
        role = read_simlm(Path(resolved)).get("role", "reranker")
        if role != "reranker":
            raise ModelError(f"{resolved}: this is a {role}, a reranker was expected; give the folder of a train_reranker step")
        return cls(load_classifier(resolved))
