"""The cross-encoder: reads query and passage together, one score (raw logit) a pair.

Source: SimLM, arXiv 2207.02578, section 3.2 (the re-ranker).
Shapes: B pairs, T tokens.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import disk_error, write_json
from simlm.errors import ModelError
from simlm.models.backbone import has_fresh_head, load_classifier, max_positions, quiet, takes_token_types
from simlm.models.model_folder import SIMLM_FILE, save_tokenizer
from simlm.recipe import ModelSettings


class CrossEncoder(nn.Module):
    """A sequence classifier with one label."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        if classifier.config.num_labels != 1:
            raise ModelError(f"a classifier of {classifier.config.num_labels} labels was given, a re-ranker has 1")
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Raw logits, float32 [B]; higher is more relevant, comparable within a query.

        input_ids: int64 [B, T], padded on the right. attention_mask: 1 = token; None = no padding anywhere, which is faster.
        token_type_ids: None = all 0; ignored in families without segments.
        """
        types = {"token_type_ids": token_type_ids} if takes_token_types(self.classifier) else {}
        logits_B1 = self.classifier(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return cast("Tensor", logits_B1.squeeze(-1).float())

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerFast, *, max_pair_tokens: int) -> None:
        """Write a folder that simlm, sentence_transformers.CrossEncoder(folder) and AutoModelForSequenceClassification load.

        Scores are raw logits there too (activation Identity). Raises ModelError if `max_pair_tokens` is more than the model has
        positions, DiskError if the folder cannot be written.
        """
        folder = Path(folder)
        positions = max_positions(self.classifier)
        if positions is not None and max_pair_tokens > positions:
            raise ModelError(
                f"{folder}: pairs of up to {max_pair_tokens} tokens, but the model has {positions} positions; lower max_pair_tokens"
            )
        self.classifier.config.sentence_transformers = {
            "activation_fn": "torch.nn.modules.linear.Identity",
            "version": metadata.version("sentence-transformers"),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                self.classifier.save_pretrained(str(folder))
            save_tokenizer(folder, tokenizer, max_tokens=max_pair_tokens, token_types=takes_token_types(self.classifier))
            write_json(folder / SIMLM_FILE, {"role": "reranker", "max_pair_tokens": max_pair_tokens})
        except OSError as error:
            raise disk_error(error, folder) from error

    @classmethod
    def from_encoder(
        cls,
        ref: str | Path | ModelSettings,
        *,
        seed: int = 0,
        dropout: float | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> CrossEncoder:
        """A cross-encoder on any encoder checkpoint; its head starts fresh (from `seed`) unless the checkpoint has one of one label.

        dropout: None = the checkpoint's own. tokenizer: for "scratch" (vocabulary and special tokens).
        Raises ModelError if there is no such checkpoint, or it is a classifier with another number of labels.
        """
        settings = ref if isinstance(ref, ModelSettings) else ModelSettings(start=str(ref))
        return cls(load_classifier(settings, seed=seed, dropout=dropout, tokenizer=tokenizer))

    @classmethod
    def load(cls, ref: str | Path, *, dropout: float | None = None, settings: ModelSettings | None = None) -> CrossEncoder:
        """A trained cross-encoder: a saved re-ranker or any sequence classifier with one label (path or hub id).

        settings: revision and attention. Raises ModelError if the checkpoint has no classification head, or one of more labels.
        """
        settings = (settings or ModelSettings()).model_copy(update={"start": str(ref)})
        classifier = load_classifier(settings, dropout=dropout)
        if has_fresh_head(classifier):
            raise ModelError(
                f"{ref}: this is an encoder without a trained re-ranking head; give a folder made by train_reranker, or train one"
            )
        return cls(classifier)
