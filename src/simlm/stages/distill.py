"""distill: groups with a re-ranker's scores -> bi-encoder, by KL(teacher, student) + alpha x InfoNCE (method.md section 2).

Inputs: "store", "groups", "teacher" (run of split train with raw logits for the pairs of the groups), "teacher.2", "teacher.3" ... where
several are to be averaged, "model" where the recipe starts from the pre-trained encoder or from the retriever before; and, where teacher
and student were compared, "check" (what is to be done), "student" (that retriever) and "student_scores" (its logits for the same pairs).
Output: as train_retriever; where the check says that there is nothing to learn from the teacher, a copy of "student".
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simlm.artifacts import MANIFEST, open_artifact, read_manifest
from simlm.recipe import DistillSettings
from simlm.stages import Context

if TYPE_CHECKING:
    from simlm.data.store import Store
    from simlm.data.teachers import TeacherGroups

LOG = "log.jsonl"


def run(settings: DistillSettings, inputs: dict[str, Path], context: Context) -> None:
    """Train on the teacher's scores and save the retriever. Pairs without a score are found before training starts.

    Facts: distilled (False for a copy), those of the training, and of the teachers: num_teachers, teacher_weight (1 without the student).
    """
    check = read_manifest(inputs["check"], "report").facts if "check" in inputs else {}
    if check.get("action") == "skip":
        _keep_student(inputs["student"], check, context)
    else:
        _distill(settings, inputs, context, check)


def _keep_student(student: Path, check: Mapping[str, Any], context: Context) -> None:
    """Copy the retriever that nothing could be taught."""
    artifact = open_artifact(student, "model")
    if context.rank == 0:
        for name in artifact.manifest.files:
            if name not in (MANIFEST, LOG):
                target = context.work / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.file(name), target)
    context.record(distilled=False, copy_of=check["student_name"], num_steps=0)
    context.progress.say(f"distill: the teacher has nothing to teach, so this is {check['student_name']} as it was")


def _distill(settings: DistillSettings, inputs: dict[str, Path], context: Context, check: Mapping[str, Any]) -> None:
    from simlm.data.duplicates import Duplicates
    from simlm.data.false_negatives import TeacherMargin
    from simlm.data.groups import Ambiguous, TrainingGroups
    from simlm.data.store import Store
    from simlm.training.contrastive import train_biencoder
    from simlm.training.retriever_model import save_biencoder, start_biencoder

    store = Store.open(inputs["store"])
    taught = _taught_groups(inputs, store, context, check)
    if taught.num_bare:
        context.progress.say(f"distill: {taught.num_bare:,} queries have no negative with a teacher's score and are left out")
    if taught.num_constant:
        context.progress.say(
            f"distill: for {taught.num_constant:,} of {len(taught.groups):,} queries all passages have the same teacher score; "
            "they teach nothing"
        )
    groups = TrainingGroups(
        taught.groups,
        num_passages=len(store.passages),
        group_size=settings.group_size,
        queries_per_step=settings.queries_per_step,
        seed=context.seed,
        num_ranks=context.num_ranks,
        judged=store.qrels("train"),
        fill_with_random=False,
        duplicates=Duplicates(store.passages, store.queries("train"), taught.groups, store.qrels("train")),
        margin=None if settings.teacher_margin is None else TeacherMargin(settings.teacher_margin, taught.groups),
        sampling=Ambiguous.of(settings),
    )
    tokenizer = store.tokenizer()
    model, settings = start_biencoder(settings, inputs, tokenizer, seed=context.seed)
    result = train_biencoder(model, store, groups, settings, context, description="distill")
    context.record(
        **result.facts(),
        **groups.facts(),
        distilled=True,
        num_teachers=sum(role.split(".")[0] == "teacher" for role in inputs),
        teacher_weight=check["teacher_weight"] if check.get("action") == "mix" else 1.0,
        teacher_depth=taught.depth,
        num_constant_teacher_queries=taught.num_constant,
        num_queries_without_negatives=taught.num_bare,
    )
    if context.rank == 0:
        save_biencoder(model, context.work, tokenizer, settings, store)


def _taught_groups(inputs: dict[str, Path], store: Store, context: Context, check: Mapping[str, Any]) -> TeacherGroups:
    """The groups with what the teachers say of them, mixed with what the student says where the check found that better."""
    from simlm.data.teachers import of_scored_queries, teacher_groups
    from simlm.rankings import Groups, Run
    from simlm.training.teaching import mixture_of

    artifacts = [open_artifact(path, "run") for role, path in inputs.items() if role.split(".")[0] == "teacher"]
    teachers = [Run.load(artifact.path, "train") for artifact in artifacts]
    groups = Groups.load(open_artifact(inputs["groups"], "groups").path)
    if any(artifact.manifest.settings.get("num_queries") for artifact in artifacts):
        groups = of_scored_queries(groups, teachers[0])
    mixture = None
    if check.get("action") == "mix":
        mixture = mixture_of(len(teachers), check["teacher_weight"], check["sharpness"])
        teachers.append(Run.load(open_artifact(inputs["student_scores"], "run").path, "train"))
    query_ids, passage_ids = store.queries("train").ids, store.passages.ids
    return teacher_groups(
        groups,
        teachers,
        query_id=lambda row: query_ids[row],
        passage_id=lambda row: passage_ids[row],
        folder=context.resume / f"teachers-{context.rank}",
        mixture=mixture,
    )
