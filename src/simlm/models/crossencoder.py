"""The cross-encoder: query and passage in one sequence, one raw logit. Saved as what sentence-transformers' CrossEncoder loads.

Shapes: B pairs, T tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import disk_error, write_json
from simlm.errors import ModelError
from simlm.models.backbone import encoder_of, has_fresh_head, load_classifier, quiet, takes_token_types
from simlm.models.biencoder import check_positions
from simlm.models.direct_layers import first_states, has_direct_layers
from simlm.models.model_folder import SIMLM_FILE, read_model_folder, save_tokenizer
from simlm.recipe import ModelSettings


class _Float32Linear(nn.Linear):
    """A layer that computes in float32 whatever surrounds it: a logit of 8 in bf16 is known to 0.03 only."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class CrossEncoder(nn.Module):
    """Token tensors of pairs -> one logit each, not squashed: teacher scores stay raw (method.md section 2)."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        if classifier.config.num_labels != 1:
            raise ModelError(
                f"a re-ranker has one label, this checkpoint has {classifier.config.num_labels}; start from an encoder without a head"
            )
        outputs = [module for module in classifier.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
        outputs[-1].__class__ = _Float32Linear
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """float32 [B]: the higher the more relevant; comparable within a query only."""
        encoder = encoder_of(self.classifier)
        if has_direct_layers(encoder):
            logits_B1 = _logits(self.classifier, first_states(encoder, input_ids, attention_mask, token_type_ids))
        else:
            types = {"token_type_ids": token_type_ids} if takes_token_types(self.classifier) else {}
            logits_B1 = self.classifier(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits_B1.squeeze(-1).float()

    def save(self, folder: Path | str, tokenizer: PreTrainedTokenizerFast, *, max_pair_tokens: int) -> None:
        """Write a folder that CrossEncoder (raw logits), AutoModelForSequenceClassification, AutoModel and `load` read.

        Raises ModelError if `max_pair_tokens` is more than the model has positions, DiskError if the folder cannot be written.
        """
        folder = Path(folder)
        check_positions(self.classifier, max_pair_tokens, str(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                self.classifier.save_pretrained(folder)
                save_tokenizer(folder, tokenizer, token_types=takes_token_types(self.classifier))
                self._save_modules(folder, max_pair_tokens)
            write_json(folder / SIMLM_FILE, {"role": "reranker", "max_pair_tokens": max_pair_tokens})
        except OSError as error:
            raise disk_error(error, folder) from error

    def _save_modules(self, folder: Path, max_pair_tokens: int) -> None:
        """Let sentence-transformers write its own files: what it writes it reads."""
        from sentence_transformers import CrossEncoder as SentenceCrossEncoder

        model = SentenceCrossEncoder(str(folder), max_length=max_pair_tokens, activation_fn=nn.Identity(), device="cpu")
        model.save_pretrained(str(folder), create_model_card=False)

    @classmethod
    def from_encoder(
        cls,
        ref: str | Path | ModelSettings,
        *,
        seed: int = 0,
        dropout: float | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> CrossEncoder:
        """A re-ranker to train: the checkpoint's encoder with its own one-label head, or a fresh one drawn from `seed`.

        A head over more labels (a classifier of something else) is a ModelError.
        """
        settings = ref if isinstance(ref, ModelSettings) else ModelSettings(start=str(ref))
        return cls(load_classifier(settings, seed=seed, dropout=dropout, tokenizer=tokenizer))

    @classmethod
    def load(cls, ref: str | Path | ModelSettings, *, dropout: float | None = None) -> CrossEncoder:
        """A trained re-ranker, ours or another one-label cross-encoder (path or hub id).

        Raises ModelError if it is another role's, has no trained head, or one of another number of labels.
        """
        settings = ref if isinstance(ref, ModelSettings) else ModelSettings(start=str(ref))
        role = read_model_folder(settings.start, settings.revision).role
        if role not in (None, "reranker"):
            raise ModelError(f"{settings.start}: this is a {role}, a reranker was expected; give the folder of a train_reranker step")
        classifier = load_classifier(settings, dropout=dropout)
        if has_fresh_head(classifier):
            raise ModelError(f"{settings.start}: an encoder without a trained re-ranking head; give the folder of a train_reranker step")
        return cls(classifier)


def _logits(classifier: PreTrainedModel, first_BH: Tensor) -> Tensor:
    """[B, labels], from the encoder's last states of the first position: all that the heads of these architectures read."""
    head, pooler = classifier.get_submodule("classifier"), getattr(encoder_of(classifier), "pooler", None)
    states_B1H = first_BH[:, None]
    # ELECTRA's and RoBERTa's heads take the first position by themselves.
    logits_B1: Tensor = head(states_B1H if pooler is None else classifier.get_submodule("dropout")(pooler(states_B1H)))
    return logits_B1
