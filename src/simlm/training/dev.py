"""The measure shown while a stage trains: RR@10 of the dev queries, cheap and the same whenever it is taken of the same weights.

A retriever ranks a pool (the positives of the dev queries and a seeded sample of the corpus), not the whole corpus, so its numbers are
higher than those of the report and only comparable with each other. A re-ranker re-ranks the top of a first-stage run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simlm.data.batches import collate, collate_pairs, length_batches, pair_lengths, sequence_lengths
from simlm.data.prompts import Prompt
from simlm.data.store import Store, Table
from simlm.rankings import Ints, Run
from simlm.recipe import DevSettings
from simlm.training.cached_step import inverse_order
from simlm.training.precision import autocast
from simlm.types import Split

DEV_MEASURE = "RR@10"
CUTOFF = 10
Measures = Callable[[], dict[str, float]]


def retriever_dev(
    store: Store,
    model: nn.Module,
    settings: DevSettings,
    *,
    seed: int,
    batch_tokens: int,
    bf16: bool,
    max_query_tokens: int | None = None,
    max_passage_tokens: int | None = None,
    query_prompt: Prompt | None = None,
    passage_prompt: Prompt | None = None,
) -> Measures | None:
    """A function that measures the bi-encoder as it is; None if there are no judged dev queries or the settings turn it off.

    model: token tensors -> embeddings of unit length. batch_tokens: padded tokens encoded at once.
    """
    chosen = judged_sample(store, "dev", settings.num_queries, seed)
    if not chosen:
        return None
    query_rows = np.array(sorted(chosen), dtype=np.int64)
    pool = _pool(store, chosen, settings.pool_passages, seed)
    column = {int(row): place for place, row in enumerate(pool)}
    positives = [np.array([column[row] for row in chosen[int(query)]]) for query in query_rows]

    def measure() -> dict[str, float]:
        passages_PD = _encode(model, store.passages, pool, max_passage_tokens, passage_prompt, batch_tokens, bf16=bf16)
        queries_QD = _encode(model, store.queries("dev"), query_rows, max_query_tokens, query_prompt, batch_tokens, bf16=bf16)
        scores_QP = (queries_QD @ passages_PD.T).cpu().numpy()
        ranks = [best_rank(scores, own) for scores, own in zip(scores_QP, positives, strict=True)]
        return {DEV_MEASURE: mean_reciprocal_rank(ranks)}

    return measure


def reranker_dev(
    store: Store,
    model: nn.Module,
    run: Run,
    settings: DevSettings,
    *,
    depth: int,
    max_pair_tokens: int,
    seed: int,
    batch_tokens: int,
    bf16: bool,
) -> Measures | None:
    """A function that re-ranks the first `depth` passages of a dev run; None as for `retriever_dev`.

    model: token tensors of pairs -> one logit a row. A query whose positive is not among them counts 0, so the run is the ceiling.
    """
    place = {int(query): position for position, query in enumerate(run.query_rows)}
    chosen = judged_sample(store, "dev", settings.num_queries, seed)
    if not chosen:
        return None
    ranked = {query: np.asarray(run.ranked(place[query])[0][:depth]) for query in sorted(chosen) if query in place}
    found = {query: rows for query, rows in ranked.items() if len(rows)}
    pair_queries = np.repeat(np.array(list(found), dtype=np.int64), [len(rows) for rows in found.values()])
    pair_passages = np.concatenate([*found.values(), np.empty(0, np.int64)]).astype(np.int64)

    @torch.no_grad()
    def score() -> NDArray[np.float32]:
        lengths = pair_lengths(store, "dev", pair_queries, pair_passages, max_tokens=max_pair_tokens)
        positions = length_batches(lengths, batch_tokens)
        device = _device(model)
        outputs = []
        with autocast(device.type, bf16):
            for part in positions:
                batch = collate_pairs(store, "dev", pair_queries[part], pair_passages[part], max_tokens=max_pair_tokens)
                outputs.append(model(**{name: tensor.to(device) for name, tensor in batch.tensors().items()}).float().cpu())
        logits: NDArray[np.float32] = torch.cat(outputs)[inverse_order(positions)].numpy()
        return logits

    def measure() -> dict[str, float]:
        logits = score() if len(pair_queries) else np.empty(0, np.float32)
        ranks, start = [], 0
        for query, rows in found.items():
            own = np.flatnonzero(np.isin(rows, chosen[query]))
            ranks.append(best_rank(logits[start : start + len(rows)], own))
            start += len(rows)
        ranks += [0] * (len(chosen) - len(found))
        return {DEV_MEASURE: mean_reciprocal_rank(ranks)}

    return measure


def best_rank(scores: NDArray[np.float32], positives: NDArray[np.integer]) -> int:
    """Rank (from 1) of the best-scored positive, 0 if there is none; among equal scores the earlier place wins."""
    if len(positives) == 0:
        return 0
    best = positives[np.lexsort((positives, -scores[positives]))[0]]
    return int(np.count_nonzero(scores > scores[best]) + np.count_nonzero(scores[:best] == scores[best]) + 1)


def mean_reciprocal_rank(ranks: list[int], cutoff: int = CUTOFF) -> float:
    """Mean of 1/rank, 0 for a rank beyond the cut-off or a positive that was not found."""
    return float(np.mean([1.0 / rank if 0 < rank <= cutoff else 0.0 for rank in ranks]))


def judged_sample(store: Store, split: Split, num_queries: int, seed: int) -> dict[int, list[int]]:
    """A seeded sample of the queries that have a relevant passage: query row -> passage rows; all where there are not more."""
    if num_queries == 0 or split not in store.splits:
        return {}
    judged = {query: sorted(row for row, grade in grades.items() if grade > 0) for query, grades in store.qrels(split).items()}
    usable = sorted(query for query, rows in judged.items() if rows)
    if len(usable) > num_queries:
        usable = sorted(np.random.default_rng([seed, 10]).choice(usable, num_queries, replace=False).tolist())
    return {query: judged[query] for query in usable}


def _pool(store: Store, chosen: dict[int, list[int]], size: int, seed: int) -> Ints:
    """int64, sorted: every positive of the queries, filled up with a seeded sample of the other passages."""
    positives = np.unique(np.concatenate([np.array(rows, dtype=np.int64) for rows in chosen.values()]))
    wanted = min(max(size - len(positives), 0), len(store.passages) - len(positives))
    # Positives may be drawn again, so draw that many more.
    drawn = np.random.default_rng([seed, 11]).choice(len(store.passages), min(wanted + len(positives), len(store.passages)), replace=False)
    others = drawn[~np.isin(drawn, positives)][:wanted]
    return np.sort(np.concatenate([positives, others])).astype(np.int64)


@torch.no_grad()
def _encode(
    model: nn.Module, table: Table, rows: Ints, max_tokens: int | None, prompt: Prompt | None, batch_tokens: int, *, bf16: bool
) -> Tensor:
    positions = length_batches(sequence_lengths(table, rows, max_tokens=max_tokens, prompt=prompt), batch_tokens)
    device = _device(model)
    outputs = []
    with autocast(device.type, bf16):
        for part in positions:
            batch = collate(table, rows[part], max_tokens=max_tokens, prompt=prompt).tensors()
            outputs.append(model(**{name: tensor.to(device) for name, tensor in batch.items()}).float())
    return torch.cat(outputs)[inverse_order(positions).to(device)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
