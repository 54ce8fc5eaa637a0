"""The verbs of the pipeline, one module each, and the table that names them.

A stage module has
    run(settings, inputs, context): reads finished artifacts, writes one into `context.work`;
where `settings` is the stage's model from `simlm.recipe`, and `inputs` maps an input's role to the artifact's folder.
Stages never import each other. On several processes a stage marked `distributed` runs on all of them, any other on rank 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simlm.artifacts import ArtifactBuilder, Kind
from simlm.progress import Progress


@dataclass(frozen=True)
class Context:
    """What the pipeline hands to a stage besides its settings and inputs.

    builder: the artifact under construction; `work` is where its files go, `resume` keeps what must survive a kill.
    seed: the only source of randomness. rank, num_ranks: this process among those of torchrun.
    """

    builder: ArtifactBuilder
    seed: int
    progress: Progress
    rank: int = 0
    num_ranks: int = 1

    @property
    def work(self) -> Path:
        return self.builder.work

    @property
    def resume(self) -> Path:
        return self.builder.resume

    @property
    def pair_scores(self) -> Path:
        """Folder of the run's teacher scores, which stay when the artifacts that they were made for are made again."""
        return self.builder.path.parent / "pair_scores"

    @property
    def embedding_cache(self) -> Path:
        """Folder of the vectors that earlier runs of this step have made."""
        return self.builder.path.parent / "embedding_cache" / self.builder.path.name

    def record(self, **facts: Any) -> None:
        """Keep JSON facts in the manifest (counts, losses, rates)."""
        self.builder.facts.update(facts)


@dataclass(frozen=True)
class StageRow:
    """One row of the stage table. `version` is raised whenever the stage's result changes for equal inputs."""

    module: str
    kind: Kind
    version: int
    settings: str
    distributed: bool = False

    def load(self) -> Callable[[Any, dict[str, Path], Context], None]:
        return cast("Callable[[Any, dict[str, Path], Context], None]", importlib.import_module(self.module).run)


STAGES: dict[str, StageRow] = {
    "prepare": StageRow("simlm.stages.prepare", "store", 1, "PrepareSettings"),
    "make_queries": StageRow("simlm.stages.make_queries", "store", 1, "PseudoQuerySettings"),
    "filter_queries": StageRow("simlm.stages.filter_queries", "store", 1, "ConsistencySettings"),
    "train_generator": StageRow("simlm.stages.train_generator", "model", 2, "GeneratorSettings", distributed=True),
    "pretrain": StageRow("simlm.stages.pretrain", "model", 3, "PretrainSettings", distributed=True),
    "train_retriever": StageRow("simlm.stages.train_retriever", "model", 2, "RetrieverSettings", distributed=True),
    "encode": StageRow("simlm.stages.encode", "embeddings", 1, "EncodeSettings", distributed=True),
    "build_index": StageRow("simlm.stages.build_index", "index", 2, "IndexSettings"),
    "search": StageRow("simlm.stages.search", "run", 2, "SearchSettings", distributed=True),
    "fuse": StageRow("simlm.stages.fuse", "run", 1, "FuseSettings"),
    "select_run": StageRow("simlm.stages.select_run", "run", 2, "EvaluateSettings"),
    "mine_negatives": StageRow("simlm.stages.mine_negatives", "groups", 1, "MiningSettings"),
    "train_reranker": StageRow("simlm.stages.train_reranker", "model", 1, "RerankerSettings", distributed=True),
    "rerank": StageRow("simlm.stages.rerank", "run", 1, "RerankSettings"),
    "score_groups": StageRow("simlm.stages.score_groups", "run", 1, "HybridTeacherSettings"),
    "check_teacher": StageRow("simlm.stages.check_teacher", "report", 1, "CheckTeacherSettings"),
    "distill": StageRow("simlm.stages.distill", "model", 2, "DistillSettings", distributed=True),
    "evaluate": StageRow("simlm.stages.evaluate", "report", 1, "EvaluateSettings"),
}
