"""What lies beside the weights in a model folder: simlm.json, and the files by which sentence-transformers knows a model.

A saved retriever is a folder in the layout that sentence-transformers has read since version 2 (6.2 and later read it without a
warning, older versions too); a saved re-ranker is a plain sequence-classification folder whose config.json names the activation.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from simlm.artifacts import write_json
from simlm.errors import ModelError
from simlm.models.backbone import resolve_model

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
    """

    role: Role | None
    pooling: Pooling | None
    max_query_tokens: int | None
    max_passage_tokens: int | None
    max_pair_tokens: int | None


def read_model_folder(ref: str, revision: str | None = None) -> ModelFolder:
    """What the folder (or hub model) at `ref` says of itself. ModelError if its JSON is damaged or its pooling is not supported."""
    own = read_json(ref, SIMLM_FILE, revision) or {}
    tokens = {name: own.get(name) for name in ("max_query_tokens", "max_passage_tokens", "max_pair_tokens")}
    if own:
        return ModelFolder(own.get("role"), own.get("pooling"), **tokens)
    architectures = (read_json(ref, "config.json", revision) or {}).get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return ModelFolder("reranker", None, **tokens)
    modules = read_json(ref, "modules.json", revision)
    if modules is None:
        return ModelFolder(None, None, **tokens)
    limit = (read_json(ref, "sentence_bert_config.json", revision) or {}).get("max_seq_length")
    tokens.update(max_query_tokens=limit, max_passage_tokens=limit)
    return ModelFolder("retriever", _pooling_of(ref, cast("list[dict[str, Any]]", modules), revision), **tokens)


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


def _pooling_of(ref: str, modules: list[dict[str, Any]], revision: str | None) -> Pooling:
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(
                f"{ref}: its modules.json has a {kind} module, simlm reads Transformer, Pooling and Normalize; set the pooling"
            )
    folder = next((str(module["path"]) for module in modules if str(module.get("type", "")).endswith("Pooling")), None)
    config = (read_json(ref, f"{folder}/config.json", revision) if folder else None) or {}
    mode = config.get("pooling_mode")
    if mode is None:
        modes = [_OLD_POOLING.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        mode = modes[0] if len(modes) == 1 else modes
    if mode not in ("cls", "mean"):
        raise ModelError(f"{ref}: its pooling is {mode!r}, simlm has cls and mean; set the pooling to use the encoder all the same")
    return cast("Pooling", mode)


# --- writing ------------------------------------------------------------------------------------------------------------------------


def write_retriever_files(folder: Path, *, pooling: Pooling, dim: int, max_query_tokens: int, max_passage_tokens: int) -> None:
    """Make a folder that holds encoder and tokenizer one that SentenceTransformer(folder) loads: pooling, then unit length."""
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_passage_tokens, "do_lower_case": False})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {
                "sentence_transformers": metadata.version("sentence-transformers"),
                "transformers": metadata.version("transformers"),
                "pytorch": metadata.version("torch"),
            },
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    write_json(
        folder / SIMLM_FILE,
        {
            "role": "retriever",
            "pooling": pooling,
            "dim": dim,
            "max_query_tokens": max_query_tokens,
            "max_passage_tokens": max_passage_tokens,
        },
    )


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, token_types: bool) -> None:
    """Save a copy of the tokenizer that cuts at `max_tokens` and returns token types only where the model takes them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_tokens
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not token_types:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.save_pretrained(str(folder))
