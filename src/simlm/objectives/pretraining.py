"""What pre-training trains: one encoder pass a micro-batch, the terms of all objectives on it, one pass over the vocabulary.

Source of the generator's part: SimLM, arXiv 2207.02578, section 3.1; of the jointly trained one: method.md section 1.
Shapes: B sequences, T tokens, N rows of the head, H hidden, V vocabulary, D = H.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.errors import ModelError
from simlm.losses.language_model import cross_entropy_and_rows, token_losses
from simlm.models.backbone import embed, encoder_of, final_norm, layer_inputs, layers_of, lm_features, run_encoder, run_layers
from simlm.objectives import EncoderPass, Objective, Parts, Summed, Term, Tokens, find_objective, masked, number
from simlm.objectives.bottleneck import DECODER_FILE, Decoder, load_state, save_masked_lm, save_state
from simlm.objectives.contrast import Contrast
from simlm.objectives.generator import Generator, SelfGenerator, require_mask_token
from simlm.objectives.masking import Masking
from simlm.objectives.views import PretrainViews
from simlm.recipe import PretrainSettings

GENERATOR_FOLDER = "generator"
"""Where a jointly trained generator is saved, inside the folder of the pre-trained model."""

SIMLM_FILE = "simlm.json"


class Pretraining(nn.Module):
    """Encoder with head, generator, and the objectives of a recipe; `forward` gives a micro-batch's share of the step's loss."""

    _corpus_ids: Tensor | None
    _corpus_rows: Tensor | None

    def __init__(
        self,
        masked_lm: PreTrainedModel,
        objectives: dict[str, Objective],
        *,
        mask_token_id: int,
        views: PretrainViews,
        weights: dict[str, float] | None = None,
        generator: Generator | None = None,
        generator_weight: float = 0.2,
        self_refresh_steps: int | None = None,
        corpus_ids: Tensor | None = None,
        contrast: Contrast | None = None,
    ) -> None:
        """objectives: in the recipe's order; the first decides what the encoder reads. weights: 1 where none is given.

        corpus_ids: int64 ascending, the softmax runs over these token ids alone.
        """
        super().__init__()
        self.masked_lm = masked_lm
        self.objectives = nn.ModuleDict(objectives)
        self.generator = generator
        self.mask_token_id = mask_token_id
        self.weights = weights or dict.fromkeys(objectives, 1.0)
        self.generator_weight = generator_weight
        self.self_refresh_steps = self_refresh_steps
        self.contrast = contrast
        self.fresh: list[str] = []
        """Objectives whose decoder or head the folder that training continues from does not have."""
        self._views = views
        self._first = next(iter(objectives))
        self._contrast_weight = sum(self.weights[name] for name, objective in objectives.items() if objective.contrasts)
        self._loss_weights = {"contrast_loss": self._contrast_weight} if contrast is not None else {}
        self._early = {layer for objective in objectives.values() if (layer := objective.early_layer) is not None}
        assert len(self._early) <= 1, "objectives that want states of different layers"
        rows = None if corpus_ids is None else torch.full((masked_lm.config.vocab_size,), -1, dtype=torch.int64)
        if corpus_ids is not None and rows is not None:
            rows[corpus_ids] = torch.arange(len(corpus_ids))
        self.register_buffer("_corpus_ids", corpus_ids, persistent=False)
        self.register_buffer("_corpus_rows", rows, persistent=False)
        if not any(objective.uses_head for objective in objectives.values()):
            _freeze_head(masked_lm)

    @classmethod
    def build(cls, settings: PretrainSettings, parts: Parts) -> Pretraining:
        """From a recipe's section; ModelError if the parts do not go together.

        Decoders, heads and a joint generator come from `parts.continued` where the same objective has left them there.
        """
        objectives = {name: find_objective(name).build(settings, parts) for name in settings.objective_weights}
        cuts = list(dict.fromkeys(objective.sequences for objective in objectives.values() if objective.sequences != "passages"))
        if len(cuts) > 1:
            named = ", ".join(f"{name} ({objective.sequences})" for name, objective in objectives.items())
            raise ModelError(
                f"pretrain.objective: {named} cut passages in different ways and cannot share an encoder pass; choose one of them"
            )
        generator, refresh = _generator(settings, parts, objectives)
        contrasting = [name for name, objective in objectives.items() if objective.contrasts]
        first = next(iter(objectives.values()))
        views = PretrainViews(
            settings.encoder_mask_rate,
            settings.decoder_mask_rate if any(objective.decodes for objective in objectives.values()) else None,
            sampled=generator is not None,
            masking=Masking(settings.masking, parts.idf_V),
            cut_into=cuts[0] if cuts else first.sequences,
            extra=tuple(found for objective in objectives.values() if (found := objective.extra_views()) is not None),
        )
        module = cls(
            parts.masked_lm,
            objectives,
            mask_token_id=require_mask_token(parts.tokenizer) if reads_masks(objectives) else -1,
            views=views,
            weights=settings.objective_weights,
            generator=generator,
            generator_weight=settings.generator_weight,
            self_refresh_steps=refresh,
            corpus_ids=parts.corpus_ids if settings.softmax == "corpus" else None,
            contrast=Contrast(settings.contrast_temperature, settings.model.pooling) if contrasting else None,
        )
        if parts.continued is not None:
            module.load_objectives(parts.continued)
        return module

    def views(self) -> PretrainViews:
        return self._views

    def forward(self, **micro_batch: Any) -> dict[str, Tensor]:
        """ "loss" (this micro-batch's share of the step's) and detached parts of it to log.

        micro_batch: input_ids [B, T] (the original tokens), attention_mask [B, T] only if any row is padded, token_type_ids only if the
        model has them, `scored` (int64, flat positions b * T + t of all tokens that are not special), `step_passages`, `step` while
        training, and what `PretrainViews` and its `step_counts` add.
        """
        self._refresh(micro_batch)
        seen = self._encode(micro_batch)
        terms = self._terms(seen)
        loss, logged = self._head_losses(seen, [(name, term, weight) for name, term, weight in terms if isinstance(term, Tokens)])
        for name, term, weight in terms:
            if isinstance(term, Summed):
                share = term.total / term.divisor
                loss = loss + weight * share
                logged[f"{name}_loss"] = share.detach()
        if seen.generator_loss and self._joint:
            share = torch.stack(seen.generator_loss).sum() / self._generator_divisor(seen)
            loss = loss + self.generator_weight * share
            logged["generator_loss"] = share.detach()
        if self.contrast is not None and "contrast_gradient" in micro_batch:
            loss = loss + self._contrast_weight * self.contrast.share(seen.hidden_BTH, seen.attention_mask, micro_batch)
            logged["contrast_loss"] = micro_batch["contrast_share"]
        return {"loss": loss} | logged | self._replaced(seen, micro_batch["step_tokens"])

    @torch.no_grad()
    def measure(self, **micro_batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Dev measures as (sum, count): each term's loss, accuracies, and shares of replaced tokens.

        A contrast needs more vectors than a micro-batch has: `held_out_measures` takes it from `vectors`.
        """
        seen = self._encode(micro_batch)
        measures: dict[str, tuple[Tensor, Tensor]] = {}
        for name, term, _ in self._terms(seen):
            if isinstance(term, Tokens):
                features, matrix, bias = seen.head(term.hidden_NH)
                loss_N, correct_N = token_losses(features, matrix, bias, seen.head_ids(term.labels_N))
                measures[f"{name}_loss"] = loss_N.sum(), number(len(loss_N), loss_N)
                for focus, places_N in term.focus.items():
                    measures[f"{name}_accuracy_at_{focus}"] = (correct_N & places_N).sum().float(), places_N.sum().float()
            else:
                measures[f"{name}_loss"] = term.total, term.count
                measures |= {f"{name}_{measure}": sums for measure, sums in term.measures.items()}
        return measures | self._replaced_counts(seen)

    def total(self, measures: dict[str, float]) -> float:
        """The weighted sum of the terms' mean losses: the dev measure "loss"."""
        return sum(weight * measures[name] for name, weight in self._loss_weights.items() if name in measures)

    @property
    def wants_whole_steps(self) -> bool:
        """Whether `before_step` does anything."""
        return self.contrast is not None

    def before_step(self, micro_batches: list[dict[str, Any]], *, rank: int, num_ranks: int, seed: int) -> list[dict[str, Any]]:
        """What needs the vectors of a whole step (the trainer calls it without gradient before the first micro-batch)."""
        if self.contrast is None:
            return micro_batches
        self._refresh(micro_batches[0])  # both passes have to read the same samples
        return self.contrast.prepare(micro_batches, self.vectors, rank=rank, num_ranks=num_ranks)

    def pooled(self, batch: dict[str, Tensor], pooling: str) -> Tensor:
        """[B, H] vectors of texts as they are, in the pooling that a retriever would use; for the probe."""
        from simlm.models.biencoder import pool

        hidden_BTH, _, _ = self._run(batch["input_ids"], batch)
        return pool(hidden_BTH, batch.get("attention_mask"), "mean" if pooling == "mean" else "cls")

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write a masked-LM folder (AutoModel and AutoModelForMaskedLM load it) and beside it all that continuing needs."""
        first = self.objectives[self._first]
        facts: dict[str, object] = {"objective": self._first, "objectives": self.weights}
        decoder = getattr(first, "decoder", None)
        if decoder is not None and hasattr(decoder, "layers"):
            facts["num_decoder_layers"] = len(decoder.layers)
        save_masked_lm(self.masked_lm, folder, tokenizer, role="pretrained", **facts)
        for name, objective in self._all():
            if objective.state_dict():
                save_state(_stateful(objective), folder / _state_file(name, self._first))
        if self._joint:
            assert self.generator is not None
            (folder / GENERATOR_FOLDER).mkdir()
            save_masked_lm(self.generator.masked_lm, folder / GENERATOR_FOLDER, tokenizer, role="generator", source="joint")

    def load_objectives(self, folder: Path) -> None:
        """Take decoders and heads from a saved folder where it has those of the same objective; others stay as they were built.

        Their names are then in `fresh`. ModelError if one is of another shape.
        """
        saved_first = _saved_first(folder)
        for name, objective in self._all():
            file = folder / _state_file(name, saved_first)
            if objective.state_dict() and file.is_file():
                load_state(_stateful(objective), file, what=f"the {name} objective")
            elif objective.state_dict():
                self.fresh.append(name)

    def _all(self) -> list[tuple[str, Objective]]:
        return [(name, module) for name, module in self.objectives.items() if isinstance(module, Objective)]

    @property
    def _reads_samples(self) -> bool:
        """Whether the encoder does; a decoder may all the same."""
        return self.objectives[self._first].reads == "replaced"

    @property
    def _joint(self) -> bool:
        return self.generator is not None and self.generator.trained

    def _refresh(self, micro_batch: dict[str, Any]) -> None:
        """A "self" generator is a copy of the encoder at the last multiple of `self_refresh_steps`."""
        step = micro_batch.get("step")
        if self.training and self.self_refresh_steps and step is not None and step % self.self_refresh_steps == 0:
            assert isinstance(self.generator, SelfGenerator)
            self.generator.refresh(self.masked_lm, step)

    def _encode(self, batch: dict[str, Any]) -> EncoderPass:
        first = self.objectives[self._first]
        assert isinstance(first, Objective)
        generator_loss: list[Tensor] = []
        if first.reads == "replaced":
            assert self.generator is not None
            encoder_BT, loss = self.generator.replace(
                batch["input_ids"],
                batch.get("attention_mask"),
                batch.get("token_type_ids"),
                batch["encoder_positions"],
                batch["encoder_uniforms"],
            )
            generator_loss.append(loss)
        elif first.reads == "masked":
            encoder_BT = masked(batch["input_ids"], batch["encoder_positions"], self.mask_token_id)
        else:
            encoder_BT = batch["input_ids"]
        hidden_BTH, early_BTH, inputs = self._run(encoder_BT, batch)
        return EncoderPass(
            masked_lm=self.masked_lm,
            generator=self.generator,
            mask_token_id=self.mask_token_id,
            head=self._head,
            head_ids=self._head_ids,
            batch=batch,
            encoder_BT=encoder_BT,
            hidden_BTH=hidden_BTH,
            early_BTH=early_BTH,
            inputs=inputs,
            generator_loss=generator_loss,
        )

    def _run(self, ids_BT: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
        """(last states, states of the early layer if any is wanted, what layers take besides states)."""
        encoder = encoder_of(self.masked_lm)
        hidden_BTH = embed(encoder, ids_BT, batch.get("token_type_ids"))
        inputs = layer_inputs(encoder, hidden_BTH, batch.get("attention_mask"))
        if not self._early:
            return run_encoder(encoder, hidden_BTH, inputs), None, inputs
        (early,) = self._early
        layers = layers_of(encoder)
        early_BTH = run_layers(layers[:early], hidden_BTH, inputs)
        hidden_BTH = run_layers(layers[early:], early_BTH, inputs)
        norm = final_norm(encoder)
        return hidden_BTH if norm is None else norm(hidden_BTH), early_BTH, inputs

    def vectors(self, batch: dict[str, Any]) -> Tensor:
        """Unit vectors [B, H] of a micro-batch's sequences as the encoder reads them; only with a contrast."""
        assert self.contrast is not None
        seen = self._encode(batch)
        return self.contrast.vectors(seen.hidden_BTH, seen.attention_mask)

    def _terms(self, seen: EncoderPass) -> list[tuple[str, Term, float]]:
        """(name, term, weight), names being unique; the weights are kept for `total`."""
        found: list[tuple[str, Term, float]] = []
        for name, objective in self._all():
            terms = objective.encoder_terms(seen) if name == self._first else []
            for term in [*terms, *objective.terms(seen)]:
                unique = term.name if all(term.name != other for other, _, _ in found) else f"{name}_{term.name}"
                found.append((unique, term, self.weights[name] * term.weight))
                self._loss_weights[f"{unique}_loss"] = self.weights[name] * term.weight
        return found

    def _head_losses(self, seen: EncoderPass, terms: list[tuple[str, Tokens, float]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the terms that go through the head, and each one's own share.

        One pass over the vocabulary for all of them: the shared head's gradient is made once.
        """
        if not terms:
            return torch.zeros((), device=seen.original_BT.device), {}
        features, matrix, bias = seen.head(torch.cat([term.hidden_NH for _, term, _ in terms]))
        labels = seen.head_ids(torch.cat([term.labels_N for _, term, _ in terms]))
        factors = [weight / term.divisor for _, term, weight in terms]
        row_weights = None
        if len(set(factors)) > 1:
            shares = zip(terms, factors, strict=True)
            row_weights = torch.cat([labels.new_full(term.labels_N.shape, factor, dtype=torch.float32) for (_, term, _), factor in shares])
        total, loss_N = cross_entropy_and_rows(features, matrix, bias, labels, row_weights_N=row_weights)
        loss = total if row_weights is not None else total * factors[0]
        rows = torch.split(loss_N, [len(term.labels_N) for _, term, _ in terms])
        return loss, {f"{name}_loss": part.sum() / term.divisor for (name, term, _), part in zip(terms, rows, strict=True)}

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        features, weight, bias = lm_features(self.masked_lm, hidden)
        ids = self._corpus_ids
        if ids is None:
            return features, weight, bias
        return features, weight.index_select(0, ids), None if bias is None else bias.index_select(0, ids)

    def _head_ids(self, ids: Tensor) -> Tensor:
        rows = self._corpus_rows
        if rows is None:
            return ids
        return rows.index_select(0, ids)

    def _replaced(self, seen: EncoderPass, step_tokens: float) -> dict[str, Tensor]:
        return {name: share / step_tokens for name, (share, _) in self._replaced_counts(seen).items()}

    def _replaced_counts(self, seen: EncoderPass) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens that another one stands in place of, for each side that reads samples, and all scored tokens."""
        sides = {}
        if self._reads_samples:
            sides["encoder_replaced"] = seen.encoder_BT
        if "replaced_BT" in vars(seen):
            sides["decoder_replaced"] = seen.replaced_BT
        count = number(len(seen.scored_N), seen.original_BT)
        return {name: ((ids_BT != seen.original_BT).sum().float(), count) for name, ids_BT in sides.items()}

    def _generator_divisor(self, seen: EncoderPass) -> float:
        """Masked tokens of the step over the passes that the generator has made."""
        encoder = seen.batch["step_encoder_masked"] if self._reads_samples else 0.0
        return float(encoder + (seen.batch["step_decoder_masked"] if "replaced_BT" in vars(seen) else 0.0))


def reads_masks(objectives: dict[str, Objective]) -> bool:
    """Whether anything is ever masked, be it for the generator alone."""
    return any(objective.reads != "clean" or objective.decodes for objective in objectives.values())


def unused_settings(settings: PretrainSettings, task: Pretraining) -> list[str]:
    """Keys that the recipe gives and that nothing of `task` looks at."""
    objectives = [module for module in task.objectives.values() if isinstance(module, Objective)]
    samples = task.generator is not None
    used = {
        "decoder_layers": any(isinstance(getattr(objective, "decoder", None), Decoder) for objective in objectives),
        "decoder_mask_rate": any(objective.decodes or hasattr(objective, "hidden_rate") for objective in objectives),
        "encoder_mask_rate": any(objective.reads != "clean" for objective in objectives),
        "masking": any(objective.reads != "clean" for objective in objectives),
        "skip_layer": any(objective.early_layer is not None for objective in objectives),
        "ordinary_weight": any(hasattr(objective, "ordinary_weight") for objective in objectives),
        "contrast_temperature": task.contrast is not None,
        "softmax": any(objective.uses_head for objective in objectives),
        "generator": samples,
        "generator_temperature": samples,
        "generator_weight": samples and settings.generator == "joint",
        "self_refresh_steps": samples and settings.generator == "self",
    }
    return [key for key, is_used in used.items() if not is_used and key in settings.model_fields_set]


def _generator(settings: PretrainSettings, parts: Parts, objectives: dict[str, Objective]) -> tuple[Generator | None, int | None]:
    """(generator, steps between two copies where it is the encoder's own) as far as any objective reads samples."""
    wanting = [name for name, objective in objectives.items() if objective.reads == "replaced"]
    if not wanting:
        return None, None
    temperature = settings.generator_temperature
    if settings.generator == "self":
        return SelfGenerator(copy.deepcopy(parts.masked_lm), parts.tokenizer, temperature=temperature), settings.self_refresh_steps
    own = parts.continued / GENERATOR_FOLDER if parts.continued is not None else None
    folder = own if settings.generator == "joint" and own is not None and own.is_dir() else parts.generator
    if folder is None:
        raise ModelError(
            f"pretrain.objective: {wanting[0]} samples from a generator, but none was given; "
            'run train_generator first, or set pretrain.generator = "self"'
        )
    return Generator.load(str(folder), parts.tokenizer, temperature=temperature, trained=settings.generator == "joint"), None


def _freeze_head(masked_lm: PreTrainedModel) -> None:
    """No gradient for a head that no term uses: DDP would wait for it."""
    encoder = {id(parameter) for parameter in encoder_of(masked_lm).parameters()}
    for parameter in masked_lm.parameters():
        if id(parameter) not in encoder:
            parameter.requires_grad_(False)


def _stateful(objective: Objective) -> nn.Module:
    """What is saved of an objective: its decoder where that is all it has, so that folders look alike, else all of it."""
    children = dict(objective.named_children())
    own = [name for name, _ in objective.named_parameters(recurse=False)]
    return children["decoder"] if list(children) == ["decoder"] and not own else objective


def _state_file(name: str, first: str) -> str:
    return DECODER_FILE if name == first else f"objective-{name}.safetensors"


def _saved_first(folder: Path) -> str:
    import json

    try:
        facts = json.loads((folder / SIMLM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / SIMLM_FILE}: cannot be read ({error}); give the whole folder of the pre-trained model") from error
    return str(facts.get("objective", "replaced_lm"))
