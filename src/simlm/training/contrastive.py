"""Training a bi-encoder: the steps that a store and groups make, and the loss of a step. Used by train_retriever and distill.

Shapes: Q queries of this process, A queries of all processes, G group size, P = A*G passages of all processes, D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simlm.data.batches import collate, length_batches, sequence_lengths
from simlm.data.groups import TrainingGroups, share_of_rank
from simlm.data.prompts import Prompt
from simlm.data.store import Store, Table
from simlm.errors import DataError, RecipeError
from simlm.losses.compression import binary_rounded, cut, int8_rounded
from simlm.losses.contrastive import group_scores, info_nce, info_nce_all_pairs, query_to_passages
from simlm.losses.distillation import distillation_kl, listwise_likelihood, margin_mse, teacher_entropy
from simlm.models.biencoder import BiEncoder
from simlm.rankings import Floats, Groups, Ints
from simlm.recipe import LOWEST_TEMPERATURE, DistillSettings, RetrieverSettings
from simlm.training.cached_step import Piece, encode_pieces, gather_ranks, inverse_order, piece_tokens
from simlm.training.dev import DEV_MEASURE, retriever_dev
from simlm.training.trainer import MicroBatch, TrainingContext, TrainingResult, mixed_precision, num_training_steps, train


def train_biencoder(
    model: BiEncoder, store: Store, groups: TrainingGroups, settings: RetrieverSettings, context: TrainingContext, *, description: str
) -> TrainingResult:
    """Train a bi-encoder in place; its dev measure is RR@10 over a pool of passages.

    Raises RecipeError if a matryoshka size is not below the model's dimension, DataError if scores to be distilled are not finite.
    """
    _check(settings, model.dim, groups.groups)
    groups.say_what_differs(context.progress, settings.queries_per_step, description)
    query_prompt, passage_prompt = prompts_of(store, settings)
    _, bf16 = mixed_precision(settings.training)
    dev = retriever_dev(
        store,
        model,
        settings.dev,
        seed=context.seed,
        batch_tokens=settings.micro_batch_tokens,
        bf16=bf16,
        max_query_tokens=settings.max_query_tokens,
        max_passage_tokens=settings.max_passage_tokens,
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
    )
    num_steps = num_training_steps(settings.training, len(groups), groups.queries_per_step)
    task = ContrastiveTask(model, settings, rank=context.rank, num_ranks=context.num_ranks)
    result = train(
        task,
        ContrastiveBatches(store, groups, settings, num_steps, query_prompt, passage_prompt),
        settings=settings.training,
        context=context,
        dev=dev,
        main_dev_measure=DEV_MEASURE if dev else None,
        description=description,
    )
    return replace(result, task_facts=task.facts())


def _check(settings: RetrieverSettings, dim: int, groups: Groups) -> None:
    for size in settings.matryoshka:
        if size >= dim:
            raise RecipeError(f"matryoshka = {settings.matryoshka}: the model's embeddings have {dim} numbers; name sizes below that")
    if isinstance(settings, DistillSettings):
        _check_finite(groups.query_rows, groups.positive_offsets, groups.positive_scores)
        _check_finite(groups.query_rows, groups.negative_offsets, groups.negative_scores)


def _check_finite(query_rows: Ints, offsets: Ints, scores: Floats, block: int = 1 << 20) -> None:
    """Reads the scores block by block, as there may be more than fit in memory."""
    for start in range(0, len(scores), block):
        bad = np.flatnonzero(~np.isfinite(scores[start : start + block]))
        if len(bad):
            position = int(np.searchsorted(offsets, start + bad[0], side="right")) - 1
            raise DataError(
                f"a passage of the group of training query row {query_rows[position]} has no finite teacher score, and distillation "
                "needs one for each; run the rerank step again over these groups"
            )


def prompts_of(store: Store, settings: RetrieverSettings) -> tuple[Prompt | None, Prompt | None]:
    """The prompts of queries and of passages in the store's tokens; RecipeError if one leaves no room for a text."""
    tokenizer = store.tokenizer()
    query_tokens = min(settings.max_query_tokens or math.inf, int(store.info["max_query_tokens"]))
    passage_tokens = min(settings.max_passage_tokens or math.inf, int(store.info["max_passage_tokens"]))
    return (
        Prompt.of(tokenizer, settings.query_prompt or "", int(query_tokens), key="query_prompt"),
        Prompt.of(tokenizer, settings.passage_prompt or "", int(passage_tokens), key="passage_prompt"),
    )


@dataclass(frozen=True)
class ContrastiveBatches:
    """Whole steps of groups, tokens sorted by length into pieces; one micro-batch a step, which the task encodes in bounded memory."""

    store: Store
    groups: TrainingGroups
    settings: RetrieverSettings
    num_steps: int
    query_prompt: Prompt | None = None
    passage_prompt: Prompt | None = None

    def load(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """This process's queries and passages of a step, and what is no negative among the passages of all."""
        settings = self.settings
        whole = self.groups.step(step)
        own = share_of_rank(len(whole.positions), rank, num_ranks)
        passage_rows = whole.passage_rows[own].reshape(-1)
        query_rows = whole.query_rows[own]
        passages, passage_places = self._pieces(self.store.passages, passage_rows, settings.max_passage_tokens, self.passage_prompt)
        queries, query_places = self._pieces(self.store.queries("train"), query_rows, settings.max_query_tokens, self.query_prompt)
        # Queries come last in the pieces and first in the result.
        order = torch.cat([query_places + len(passage_rows), passage_places])
        excluded_AP, excluded_AA = self.groups.excluded(whole)
        batch: MicroBatch = {
            "pieces": [*passages, *queries],
            "order": order,
            "num_queries": len(query_rows),
            "excluded_QP": torch.from_numpy(excluded_AP[own]),
        }
        if settings.contrast == "all_pairs":
            batch["excluded_QA"] = torch.from_numpy(excluded_AA[own])
        if settings.temperature_mode == "warmup":
            batch["temperature"] = warmed_up(settings, step)
        if isinstance(settings, DistillSettings):
            batch["teacher_scores_QG"] = torch.from_numpy(np.ascontiguousarray(whole.scores[own], dtype=np.float32))
        return [batch]

    def _pieces(self, table: Table, rows: Ints, max_tokens: int | None, prompt: Prompt | None) -> tuple[list[Piece], Tensor]:
        lengths = sequence_lengths(table, rows, max_tokens=max_tokens, prompt=prompt)
        positions = length_batches(lengths, piece_tokens(self.settings.micro_batch_tokens))
        pieces = [collate(table, rows[part], max_tokens=max_tokens, prompt=prompt).tensors() for part in positions]
        return pieces, inverse_order(positions)


def warmed_up(settings: RetrieverSettings, step: int) -> float:
    """The temperature of a step (0, 1, ...): linear from temperature_start to temperature, reached at step temperature_warmup_steps."""
    assert settings.temperature_start is not None and settings.temperature_warmup_steps is not None
    progress = min(1.0, step / settings.temperature_warmup_steps)
    return settings.temperature_start + progress * (settings.temperature - settings.temperature_start)


ROUNDED: Mapping[str, Callable[[Tensor], Tensor] | None] = {"none": None, "int8": int8_rounded, "binary": binary_rounded}
"""What `quantisation` does to passages."""


class ContrastiveTask(nn.Module):
    """Loss of a bi-encoder on one step: InfoNCE, for a DistillSettings distill_loss(student, teacher) + contrastive_weight x InfoNCE.

    model: token tensors -> embeddings of unit length. The loss is a mean over the whole embedding and its matryoshka sizes, with passages
    rounded as `quantisation` says. Each process computes the part of its own queries; the parts sum to the step's loss.
    Other measures: contrastive (InfoNCE), accuracy (share of queries with the positive on top of all passages of the step, as the whole
    embedding sees them), temperature where it changes, and for distillation the value under the name of distill_loss, teacher_entropy
    (nats), and each term's share of the gradient that the step's embeddings get: contrastive_gradient_share and NAME_gradient_share,
    norms as fractions of their sum.
    A learned temperature is trained as `log_temperature`; `prepare_optimizer` gives it its own learning rate.
    """

    def __init__(self, model: nn.Module, settings: RetrieverSettings, *, rank: int = 0, num_ranks: int = 1) -> None:
        super().__init__()
        self.model = model
        self._settings = settings
        self._rank = rank
        self._num_ranks = num_ranks
        learned = settings.temperature_mode == "learned"
        # One number in a row, as sharding knows no parameter without a dimension.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(settings.temperature)])) if learned else None

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a learned temperature its own learning rate and no weight decay, and keep it at LOWEST_TEMPERATURE or above."""
        parameter = self.log_temperature
        if parameter is None:
            return
        for group in optimizer.param_groups:
            group["params"] = [other for other in group["params"] if other is not parameter]
        optimizer.add_param_group({"params": [parameter], "lr": self._settings.temperature_learning_rate, "weight_decay": 0.0})

        @torch.no_grad()
        def keep_above(*_: Any) -> None:
            parameter.clamp_(min=math.log(LOWEST_TEMPERATURE))

        optimizer.register_step_post_hook(keep_above)

    def facts(self) -> dict[str, float]:
        """What training has set beside the model, for the manifest."""
        return {} if self.log_temperature is None else {"temperature": self.log_temperature.detach().exp().item()}

    def forward(
        self,
        *,
        pieces: list[Piece],
        order: Tensor,
        num_queries: int,
        excluded_QP: Tensor,
        excluded_QA: Tensor | None = None,
        teacher_scores_QG: Tensor | None = None,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """See the class; the arguments are what ContrastiveBatches.load gives. temperature: of a step that warms up."""
        settings = self._settings
        embeddings = encode_pieces(self.model, pieces, order, max_kept_tokens=settings.micro_batch_tokens)
        whole_AD = gather_ranks(embeddings[:num_queries], self._num_ranks)
        whole_PD = gather_ranks(embeddings[num_queries:], self._num_ranks)
        step = _Step(
            rows_Q=torch.arange(self._rank * num_queries, (self._rank + 1) * num_queries, device=order.device),
            group_size=len(whole_PD) // len(whole_AD),
            temperature=self._temperature(temperature),
            excluded_QP=excluded_QP,
            excluded_QA=excluded_QA,
            teacher_scores_QG=teacher_scores_QG,
        )
        rounded = ROUNDED[settings.quantisation]
        found: list[dict[str, Tensor]] = []
        for size in (embeddings.shape[1], *settings.matryoshka):
            queries_AD, passages_PD = cut(whole_AD, size), cut(whole_PD, size)
            found.append(self._terms(queries_AD, passages_PD if rounded is None else rounded(passages_PD), step))
        terms = {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}
        outputs = {name: value.detach() for name, value in terms.items()}
        outputs["accuracy"] = _accuracy(whole_AD, whole_PD if rounded is None else rounded(whole_PD), step)
        if settings.temperature_mode != "fixed":
            outputs["temperature"] = torch.as_tensor(step.temperature, device=order.device).detach().sum()
        if isinstance(settings, DistillSettings):
            assert teacher_scores_QG is not None
            outputs["teacher_entropy"] = teacher_entropy(teacher_scores_QG, teacher_temperature=settings.teacher_temperature)
            terms["contrastive"] = settings.contrastive_weight * terms["contrastive"]
            if embeddings.requires_grad:
                outputs |= self._gradient_shares(terms, embeddings)
        outputs["loss"] = torch.stack(list(terms.values())).sum()
        # All processes have as many queries, so the step's mean is the mean of theirs.
        return {name: value / self._num_ranks for name, value in outputs.items()}

    def _temperature(self, warmed_up: float | None) -> float | Tensor:
        if self.log_temperature is not None:
            return self.log_temperature.exp()
        return self._settings.temperature if warmed_up is None else warmed_up

    def _terms(self, queries_AD: Tensor, passages_PD: Tensor, step: _Step) -> dict[str, Tensor]:
        """Name -> mean over this process's queries, without weights."""
        settings = self._settings
        queries_QD = queries_AD[step.rows_Q]
        if settings.contrast == "all_pairs":
            contrastive = info_nce_all_pairs(
                queries_AD,
                passages_PD,
                torch.arange(len(queries_AD), device=queries_AD.device) * step.group_size,
                temperature=step.temperature,
                rows_Q=step.rows_Q,
                excluded_QP=step.excluded_QP,
                excluded_QA=step.excluded_QA,
            )
        else:
            contrastive = info_nce(queries_QD, passages_PD, step.positives_Q, temperature=step.temperature, excluded_QP=step.excluded_QP)
        if not isinstance(settings, DistillSettings):
            return {"contrastive": contrastive}
        assert step.teacher_scores_QG is not None
        passages_QGD = passages_PD.view(len(queries_AD), step.group_size, -1)[step.rows_Q]
        return {
            settings.distill_loss: _distill(settings, group_scores(queries_QD, passages_QGD), step.teacher_scores_QG),
            "contrastive": contrastive,
        }

    def _gradient_shares(self, terms: dict[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
        """Norm of what each term, over all processes, wants of the step's embeddings, as a fraction of the sum of the norms."""
        # What lies behind the embeddings is not entered: this costs a second pass over [Q, P] scores, nothing beside the encoder.
        gradients = [torch.autograd.grad(term, embeddings, retain_graph=True)[0] for term in terms.values()]
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients])
        if self._num_ranks > 1:
            torch.distributed.all_reduce(squares)
        norms = squares.sqrt()
        shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
        return {f"{name}_gradient_share": share for name, share in zip(terms, shares, strict=True)}


@dataclass(frozen=True)
class _Step:
    """What the loss of a step needs beside the embeddings; rows_Q: this process's queries among those of all."""

    rows_Q: Tensor
    group_size: int
    temperature: float | Tensor
    excluded_QP: Tensor
    excluded_QA: Tensor | None
    teacher_scores_QG: Tensor | None

    @property
    def positives_Q(self) -> Tensor:
        return self.rows_Q * self.group_size


def _distill(settings: DistillSettings, student_QG: Tensor, teacher_QG: Tensor) -> Tensor:
    if settings.distill_loss == "listwise":
        return listwise_likelihood(student_QG, teacher_QG, student_temperature=settings.student_temperature)
    loss = {"kl": distillation_kl, "margin_mse": margin_mse}[settings.distill_loss]
    return loss(student_QG, teacher_QG, student_temperature=settings.student_temperature, teacher_temperature=settings.teacher_temperature)


@torch.no_grad()
def _accuracy(queries_AD: Tensor, passages_PD: Tensor, step: _Step) -> Tensor:
    scores_QP = query_to_passages(queries_AD[step.rows_Q], passages_PD, temperature=1.0, excluded_QP=step.excluded_QP)
    return (scores_QP.argmax(dim=1) == step.positives_Q).float().mean()
