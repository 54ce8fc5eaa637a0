"""Export to sentence-transformers: `retriever/`, which SentenceTransformer loads, and `reranker/`, which CrossEncoder loads.

The run's own model folders have that form already; here they come without what only a run needs, and with a model card.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from simlm.artifacts import Artifact
from simlm.export.finished_run import FinishedRun
from simlm.export.model_card import model_card
from simlm.progress import Progress

CARD = "README.md"
OF_THE_RUN = ("log.jsonl",)
"""Files of a model artifact that say nothing of the model."""

RETRIEVER_USE = """
## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OF_THIS_FOLDER")
queries = model.encode_query(["your question"])
passages = model.encode_document([("title", "text of a passage"), "a passage without a title"])
scores = queries @ passages.T
```

`encode_query` and `encode_document` cut at the lengths, and put the prompts before the texts, that the model was trained with; a passage
with a title is a pair. `simlm.load_retriever("PATH_OF_THIS_FOLDER")` gives the same vectors.
"""

RERANKER_USE = """
## Use

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH_OF_THIS_FOLDER")
scores = model.predict([("your question", "title text of a passage")])
```

A title goes before the text, with a space between them. `simlm.load_reranker("PATH_OF_THIS_FOLDER")` gives the same scores.
"""


def write(run: FinishedRun, folder: Path, progress: Progress) -> dict[str, Any]:
    """Facts: retriever (its name in the run), reranker (bool)."""
    save_retriever(run, folder / "retriever")
    (folder / "retriever" / CARD).write_text(model_card(run, "retriever", RETRIEVER_USE), encoding="utf-8")
    if run.reranker is not None:
        copy_model(run.reranker, folder / "reranker")
        (folder / "reranker" / CARD).write_text(model_card(run, "reranker", RERANKER_USE), encoding="utf-8")
    return {"retriever": run.chosen.name, "reranker": run.reranker is not None}


def save_retriever(run: FinishedRun, folder: Path) -> None:
    """The retriever as a sentence-transformers folder, without a card."""
    model = run.chosen.model
    if model is not None and (model.path / "modules.json").is_file():
        copy_model(model, folder)
        return
    from simlm.models.backbone import load_tokenizer

    source = run.chosen.source
    retriever = run.load_retriever()
    retriever.inference.model.save(  # type: ignore[operator]
        folder,
        load_tokenizer(source.start, source.revision),
        max_query_tokens=retriever.max_query_tokens,
        max_passage_tokens=retriever.max_passage_tokens,
        query_prompt=retriever.query_prompt,
        passage_prompt=retriever.passage_prompt,
    )


def copy_model(model: Artifact, folder: Path) -> None:
    """The files of a model artifact that the model consists of."""
    for name in model.manifest.files:
        if name not in OF_THE_RUN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.file(name), folder / name)
