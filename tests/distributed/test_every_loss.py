"""Every loss of a retriever has one value and one gradient: encoded at once or in pieces, by 1, 2 or 3 processes, with dropout replayed.

The losses are combinations of what the recipe's choices allow, each two values of two choices together at least once; so a new choice is
tested, or named below as one that is no loss.
"""

from __future__ import annotations

import functools
import gc
import itertools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from simlm.data.duplicates import Duplicates
from simlm.data.false_negatives import TeacherMargin
from simlm.data.groups import TrainingGroups
from simlm.data.store import Store
from simlm.recipe import DistillSettings, RetrieverSettings
from simlm.training.contrastive import ContrastiveBatches, ContrastiveTask
from tests.golden.test_finetuning_steps import ToyEncoder, make_groups

CHOICES = {
    name: get_args(field.annotation) for name, field in DistillSettings.model_fields.items() if get_origin(field.annotation) is Literal
}
NO_LOSSES = {"negatives": "which passages a group has"}
LOSSES = ("contrast", "distill_loss", "quantisation", "temperature_mode")
MATRYOSHKA: tuple[list[int], ...] = ([], [4, 2])
STEP, TINY, WHOLE = 1, 400, 10**9  # pieces are a quarter of the budget: three passages or so
WARMUP = {"temperature_start": 0.1, "temperature_warmup_steps": 4}


def combinations() -> list[tuple[Any, ...]]:
    """Values of LOSSES (distill_loss may be None) and a place in MATRYOSHKA; next is always the one with most pairs not there before."""
    values = [(None, *CHOICES[name]) if name == "distill_loss" else CHOICES[name] for name in LOSSES]
    pairs = {one: set(itertools.combinations(enumerate(one), 2)) for one in itertools.product(*values, range(len(MATRYOSHKA)))}
    missing, found = set().union(*pairs.values()), []
    while missing:
        found.append(max(pairs, key=lambda one: len(pairs[one] & missing)))
        missing -= pairs[found[-1]]
    return found


def all_losses() -> list[RetrieverSettings]:
    found: list[RetrieverSettings] = []
    for contrast, distill_loss, quantisation, mode, place in combinations():
        options: dict[str, Any] = {"contrast": contrast, "quantisation": quantisation, "temperature_mode": mode}
        options |= {"matryoshka": MATRYOSHKA[place], "queries_per_step": 6, "group_size": 3, "micro_batch_tokens": TINY}
        options |= WARMUP if mode == "warmup" else {}
        found.append(RetrieverSettings(**options) if distill_loss is None else DistillSettings(distill_loss=distill_loss, **options))
    return found


def test_the_choices_of_the_recipe_are_all_here() -> None:
    assert CHOICES.keys() == {*LOSSES, *NO_LOSSES}
    for name in LOSSES:
        assert {getattr(settings, name) for settings in all_losses() if name in type(settings).model_fields} == set(CHOICES[name])
    assert sum(type(settings) is RetrieverSettings for settings in all_losses()) > 2


class Seeded(ToyEncoder):
    """A piece may say from which seed its dropout, and that of the pieces after it, is drawn."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, seed: Tensor | None = None
    ) -> Tensor:
        if seed is not None:
            torch.manual_seed(int(seed))
        return super().forward(input_ids, attention_mask, token_type_ids)


@functools.cache
def groups_of(store: Store, num_ranks: int) -> TrainingGroups:
    """Six groups that share positives; a teacher's margin and texts leave out some more passages."""
    made = make_groups(store, 3)
    options: dict[str, Any] = {"judged": made._judged, "margin": TeacherMargin(2.0, made.groups)}
    options["duplicates"] = Duplicates(store.passages, store.queries("train"), made.groups, made._judged)
    return TrainingGroups(made.groups, num_passages=60, group_size=3, queries_per_step=6, seed=5, num_ranks=num_ranks, **options)


def task_of(settings: RetrieverSettings, *, dropout: float, dtype: torch.dtype, rank: int = 0, num_ranks: int = 1) -> ContrastiveTask:
    return ContrastiveTask(Seeded(6, dropout=dropout), settings, rank=rank, num_ranks=num_ranks).to(dtype).train()


def batch_of(store: Store, settings: RetrieverSettings, rank: int = 0, num_ranks: int = 1) -> dict[str, Any]:
    key = (type(settings), settings.contrast, settings.temperature_mode, settings.micro_batch_tokens, rank, num_ranks)
    if key not in BATCHES:
        (BATCHES[key],) = ContrastiveBatches(store, groups_of(store, num_ranks), settings, 4).load(STEP, rank, num_ranks)
    return BATCHES[key]


BATCHES: dict[Any, dict[str, Any]] = {}


def merged(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batches of all processes as one, whose pieces have the dropout that each process draws for its own."""
    whole: dict[str, Any] = {"pieces": [], "num_queries": sum(batch["num_queries"] for batch in batches)}
    queries, passages, before = [], [], 0
    for rank, batch in enumerate(batches):
        first, *rest = batch["pieces"]
        whole["pieces"] += [first | {"seed": torch.tensor(seed_of(rank))}, *rest]
        order = batch["order"] + before
        queries.append(order[: batch["num_queries"]])
        passages.append(order[batch["num_queries"] :])
        before += len(order)
    whole["order"] = torch.cat([*queries, *passages])
    for name, value in batches[0].items():
        if name not in whole:
            whole[name] = torch.cat([batch[name] for batch in batches]) if isinstance(value, Tensor) else value
    return whole


def seed_of(rank: int) -> int:
    return 100 + rank


def results(outputs: dict[str, Tensor], task: nn.Module) -> dict[str, Tensor]:
    values = {f"value {name}": value.detach().clone() for name, value in outputs.items()}
    gradients = {f"gradient {name}": parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(task.parameters()))
    return values | gradients


def at_once(store: Store, settings: RetrieverSettings, num_ranks: int, *, dropout: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """One pass over everything, all activations kept, with the pieces and the dropout of `num_ranks` processes."""
    roomy = settings.model_copy(update={"micro_batch_tokens": WHOLE})
    task = task_of(roomy, dropout=dropout, dtype=dtype)
    outputs = task(**merged([batch_of(store, settings, rank, num_ranks) for rank in range(num_ranks)]))
    outputs["loss"].backward()
    return results(outputs, task)


def of_one_piece(store: Store, settings: RetrieverSettings) -> dict[str, Tensor]:
    """All passages in one batch and all queries in another, without dropout, in float64."""
    roomy = settings.model_copy(update={"micro_batch_tokens": WHOLE})
    task, batch = task_of(roomy, dropout=0.0, dtype=torch.float64), batch_of(store, roomy)
    assert len(batch["pieces"]) == 2
    outputs = task(**batch)
    outputs["loss"].backward()
    return results(outputs, task)


def as_trained(
    store: Store, settings: RetrieverSettings, rank: int, num_ranks: int, *, dropout: float, dtype: torch.dtype
) -> dict[str, Any]:
    """What the trainer does with a rank's part of the step, in pieces whose activations are computed again."""
    task = task_of(settings, dropout=dropout, dtype=dtype, rank=rank, num_ranks=num_ranks)
    parallel = DistributedDataParallel(task) if num_ranks > 1 else task
    batch = batch_of(store, settings, rank, num_ranks)
    assert len(batch["pieces"]) > 2
    torch.manual_seed(seed_of(rank))
    outputs = parallel(**batch)
    (outputs["loss"] * num_ranks).backward()
    if num_ranks > 1:
        outputs = {name: value.detach().clone() for name, value in outputs.items()}
        for name in sorted(outputs):
            torch.distributed.all_reduce(outputs[name])
    return results(outputs, task)


def kinds(settings: RetrieverSettings) -> list[tuple[float, torch.dtype]]:
    """Dropout and type. Rounding can turn what a sum in another order differs by in float32 into a whole step: there all is in float64."""
    return [(0.3, torch.float64), (0.0, torch.float32 if settings.quantisation == "none" else torch.float64)]


def train_step(store: Store, settings: RetrieverSettings, rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    return [as_trained(store, settings, rank, num_ranks, dropout=dropout, dtype=dtype) for dropout, dtype in kinds(settings)]


PROCESSES = (3, 2)


def work(rank: int, store_path: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = Store.open(store_path)
    for num_ranks in PROCESSES:
        if rank < num_ranks:
            join(store, rank, num_ranks, Path(folder))


def join(store: Store, rank: int, num_ranks: int, folder: Path) -> None:
    meeting = f"file://{folder}/meeting-{num_ranks}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    found = [train_step(store, settings, rank, num_ranks) for settings in all_losses()]
    if rank == 0:
        torch.save(found, folder / f"{num_ranks}.pt")
    # Before the group goes: a DDP module that outlives it ends the group's threads while it holds the GIL, which they may wait for.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        difference = (found[name] - value).norm().item()
        tolerance = 1e-9 if found[name].dtype == value.dtype == torch.float64 else 1e-6
        assert difference <= tolerance * max(value.norm().item(), 1e-3), f"{where}: {name} is {found[name]} instead of {value}"


def check(found: list[list[dict[str, Tensor]]], store: Store, num_ranks: int) -> None:
    for settings, (with_dropout, without) in zip(all_losses(), found, strict=True):
        where = f"{num_ranks} processes, {settings.model_dump(include={*LOSSES, 'matryoshka'})}"
        dropout, dtype = kinds(settings)[0]
        assert_equal(with_dropout, at_once(store, settings, num_ranks, dropout=dropout, dtype=dtype), f"{where}, dropout")
        # In float32 the other order of sums alone moves one piece by up to 9e-7, so what it is compared with is exact.
        assert_equal(without, of_one_piece(store, settings), where)


def test_the_step_has_false_negatives_of_each_kind(tiny_store: Store) -> None:
    step = groups_of(tiny_store, 1).step(STEP)
    by_id = TrainingGroups(
        make_groups(tiny_store, 3).groups,
        num_passages=60,
        group_size=3,
        queries_per_step=6,
        seed=5,
        judged=make_groups(tiny_store, 3)._judged,
    )
    masked, by_id_only = groups_of(tiny_store, 1).excluded(step)[0], by_id.excluded(step)[0]
    assert by_id_only.sum() > 0 and (masked & ~by_id_only).sum() > 0


def test_one_process(tiny_store: Store) -> None:
    torch.set_num_threads(1)
    check([train_step(tiny_store, settings, 0, 1) for settings in all_losses()], tiny_store, 1)


def test_two_and_three_processes(tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for variable, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(variable, value)
    spawn(work, args=(str(tiny_store.path), str(tmp_path)), nprocs=max(PROCESSES))
    for num_ranks in PROCESSES:
        check(torch.load(tmp_path / f"{num_ranks}.pt", weights_only=True), tiny_store, num_ranks)
