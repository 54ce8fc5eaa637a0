"""Which checkpoint a stage starts from."""

from __future__ import annotations

from pathlib import Path

from simlm.artifacts import open_artifact
from simlm.errors import RecipeError
from simlm.recipe import ModelSettings


def initial_model(initial: str, model: ModelSettings, inputs: dict[str, Path]) -> ModelSettings:
    """The model section to load: `model` for "start", the input "model" (a finished artifact) for "pretrained" and "retriever2", else
    `initial` itself.

    Raises RecipeError if one of these two is asked for without such an input, ArtifactError if it is not whole.
    """
    if initial == "retriever2" and "model" not in inputs:
        raise RecipeError('initial = "retriever2", but no retriever was given; train one first, or set initial = "start"')
    if initial in ("pretrained", "retriever2"):
        if "model" not in inputs:
            raise RecipeError('initial = "pretrained", but no pre-trained model was given; run the pretrain step, or set initial = "start"')
        initial = str(open_artifact(inputs["model"], "model").path)
    elif initial == "start":
        return model
    return model.model_copy(update={"start": initial, "revision": None, "config": {}})
