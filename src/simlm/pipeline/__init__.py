"""Recipe -> plan -> run: which steps there are, which of them are done, and doing the rest.

A step is one stage with its settings and its inputs (other steps). Its fingerprint is the digest of all three, of the stage's code
version and of what lies outside (data files, local checkpoints); a step whose artifact has the same fingerprint is done. So a changed
setting re-runs its step and what depends on it, and nothing else.
"""

from simlm.pipeline.folder import DIGESTS, LOCK, held_folder, run_folder
from simlm.pipeline.folder import _locked as _locked
from simlm.pipeline.plan import Plan, State
from simlm.pipeline.planning import make_plan, retriever1_steps, store_splits
from simlm.pipeline.running import run_recipe, run_step
from simlm.pipeline.steps import Step

__all__ = [
    "DIGESTS",
    "LOCK",
    "Plan",
    "State",
    "Step",
    "held_folder",
    "make_plan",
    "retriever1_steps",
    "run_folder",
    "run_recipe",
    "run_step",
    "store_splits",
]
