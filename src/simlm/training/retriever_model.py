"""The bi-encoder of a training stage, from the checkpoint it starts from to the folder it is saved in. For train_retriever and distill."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from simlm.data.store import Store
from simlm.models.backbone import load_encoder
from simlm.models.biencoder import BiEncoder
from simlm.models.lora import add_lora, merge_lora
from simlm.models.model_folder import prompts_of
from simlm.models.vocabulary import check_vocabulary
from simlm.recipe import ModelSettings, RetrieverSettings
from simlm.training.initial import initial_model

Settings = TypeVar("Settings", bound=RetrieverSettings)


def start_biencoder(
    settings: Settings, inputs: dict[str, Path], tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> tuple[BiEncoder, Settings]:
    """(the model to train, the settings with prompts that are strings).

    seed: of fresh weights and adapters. Raises ModelError if the checkpoint has another vocabulary, and what loading it raises.
    """
    start = initial_model(settings.initial, settings.model, inputs)
    if start.start != "scratch":
        check_vocabulary(start.start, tokenizer, revision=start.revision)
    encoder = load_encoder(start, seed=seed, dropout=settings.dropout, tokenizer=tokenizer)
    if settings.lora is not None:
        add_lora(encoder, settings.lora, seed=seed)
    return BiEncoder(encoder, settings.model.pooling), with_prompts(settings, start)


def with_prompts(settings: Settings, start: ModelSettings) -> Settings:
    """The settings with prompts that are strings: where the recipe gives none, those of the checkpoint that training starts from."""
    query_prompt, passage_prompt = prompts_of(start)
    chosen = {
        "query_prompt": query_prompt if settings.query_prompt is None else settings.query_prompt,
        "passage_prompt": passage_prompt if settings.passage_prompt is None else settings.passage_prompt,
    }
    return settings.model_copy(update=chosen)


def save_biencoder(model: BiEncoder, folder: Path, tokenizer: PreTrainedTokenizerFast, settings: RetrieverSettings, store: Store) -> None:
    """Write the trained model with the lengths, prompts and sizes it was trained with, adapters merged into its weights."""
    merge_lora(model.encoder)
    model.save(
        folder,
        tokenizer,
        max_query_tokens=settings.max_query_tokens or int(store.info["max_query_tokens"]),
        max_passage_tokens=settings.max_passage_tokens or int(store.info["max_passage_tokens"]),
        query_prompt=settings.query_prompt or "",
        passage_prompt=settings.passage_prompt or "",
        matryoshka=settings.matryoshka,
    )
