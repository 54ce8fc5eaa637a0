"""What lies beside the weights in a model folder: simlm.json, and the files by which sentence-transformers knows a model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from simlm.errors import ModelError
from simlm.models.backbone import resolve_model
from simlm.recipe import ModelSettings

SIMLM_FILE = "simlm.json"
Pooling = Literal["cls", "mean"]
Role = Literal["retriever", "reranker", "pretrained", "generator"]

_OLD_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
"""Names of sentence-transformers before version 6; any other key that is true is a mode that is not read here."""


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says of its model; None where it says nothing.

    role: of simlm.json; otherwise told from the files of sentence-transformers and the architecture's name.
    max_query_tokens, max_passage_tokens, max_pair_tokens: special tokens included.
    query_prompt, passage_prompt: what stands before each text; "" = nothing, which only simlm.json says.
    matryoshka: sizes below the whole that training has also seen, to which the first numbers of a vector may be cut (and brought to unit
    length again); empty = none.
    """

    role: Role | None
    pooling: Pooling | None
    max_query_tokens: int | None
    max_passage_tokens: int | None
    max_pair_tokens: int | None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    matryoshka: tuple[int, ...] = ()


def read_model_folder(ref: str, revision: str | None = None) -> ModelFolder:
    """What the folder (or hub model) at `ref` says of itself; ModelError if its JSON is damaged or its pooling is neither cls nor mean."""
    own = read_json(ref, SIMLM_FILE, revision) or {}
    config = read_json(ref, "config.json", revision) or {}
    modules = read_json(ref, "modules.json", revision) or []
    role: Role | None = own.get("role")
    if role is None and any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        role = "reranker"
    if role is None and any(_kind(module) == "Pooling" for module in modules):
        role = "retriever"
    pooling: Pooling | None = own.get("pooling")
    limit = None
    if pooling is None and role == "retriever":
        pooling = _pooling_of(ref, modules, revision)
        limit = (read_json(ref, "sentence_bert_config.json", revision) or {}).get("max_seq_length")
        limit = limit or (read_json(ref, "tokenizer_config.json", revision) or {}).get("model_max_length")
    query_prompt, passage_prompt = _prompts_of(ref, own, revision) if role == "retriever" else (None, None)
    return ModelFolder(
        role,
        pooling,
        own.get("max_query_tokens", limit),
        own.get("max_passage_tokens", limit),
        own.get("max_pair_tokens", limit),
        query_prompt,
        passage_prompt,
        tuple(own.get("matryoshka", ())),
    )


def prompts_of(model: ModelSettings) -> tuple[str, str]:
    """What stands before each query and each passage that a model encodes.

    A retriever of ours says it itself; for any other checkpoint the settings do, or else its own sentence-transformers prompts.
    """
    if model.start == "scratch":
        return model.query_prompt or "", model.passage_prompt or ""
    found = read_model_folder(model.start, model.revision)
    own = read_json(model.start, SIMLM_FILE, model.revision) is not None and found.role == "retriever"
    chosen = []
    for wanted, said in ((model.query_prompt, found.query_prompt), (model.passage_prompt, found.passage_prompt)):
        chosen.append((said if own or wanted is None else wanted) or "")
    return chosen[0], chosen[1]


def _prompts_of(ref: str, own: dict[str, Any], revision: str | None) -> tuple[str | None, str | None]:
    """Prompts of simlm.json, else those that sentence-transformers keeps for queries and for documents."""
    if own:
        return own.get("query_prompt", ""), own.get("passage_prompt", "")
    config = read_json(ref, "config_sentence_transformers.json", revision) or {}
    prompts: dict[str, str] = config.get("prompts") or {}
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), None)
    return prompts.get("query") or None, passage


def read_json(ref: str, name: str, revision: str | None = None) -> Any:
    """A JSON file of a model folder or hub model; None if it has no such file."""
    folder = Path(resolve_model(ref))
    if folder.is_dir():
        file = folder / name
        if not file.is_file():
            return None
    else:
        found = cached_file(
            ref,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found is None:
            return None
        file = Path(found)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); copy or save the model again") from None


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def _pooling_of(ref: str, modules: list[dict[str, Any]], revision: str | None) -> Pooling:
    """The pooling of a sentence-transformers folder, which has pooling_mode since version 6 and had one flag a mode before."""
    for module in modules:
        if _kind(module) not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(
                f"{ref}: its modules.json has a {_kind(module)} module, but simlm reads Transformer, Pooling and Normalize only; "
                "start from the encoder inside it, with a pooling of your choice"
            )
    path = next(str(module["path"]) for module in modules if _kind(module) == "Pooling")
    config = read_json(ref, f"{path}/config.json", revision) or {}
    mode = config.get("pooling_mode")
    if mode is None:
        mode = "+".join(_OLD_POOLING.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True)
    if mode not in ("cls", "mean"):
        raise ModelError(f"{ref}: it pools by {mode!r}, simlm has cls and mean; name one of them to use its encoder all the same")
    return cast("Pooling", mode)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, *, token_types: bool) -> None:
    """Save a copy of the tokenizer without truncation and padding of its own, to which the name of a special token is ordinary text.

    token_types: False = it returns none, for a model that takes none.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.init_kwargs["split_special_tokens"] = True
    tokenizer.split_special_tokens = True
    if not token_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.save_pretrained(str(folder))
