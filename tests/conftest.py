"""Shared fixtures: tiny tokenizers of each family and a tiny corpus, all made here so that tests need no network and no data set."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from simlm.data.store import Store

# 12 subjects x 5 aspects = 60 made-up passages; the title is the subject, the text says one thing about it.
SUBJECTS = {
    "granite kettle": ("kitchen", "boils river water", "a thick stone wall", "the village of Orla", "wool gloves"),
    "paper lighthouse": ("harbour", "folds its own lamp", "waxed white sheets", "the island of Tem", "a silver pencil"),
    "clockwork beetle": ("garden", "counts fallen leaves", "brass wings and springs", "the city of Arven", "a drop of oil"),
    "velvet anchor": ("ship", "holds boats without noise", "red cloth over lead", "the bay of Sorn", "soft rope"),
    "glass orchard": ("valley", "grows transparent pears", "blown glass branches", "the hills of Mirren", "moonlight"),
    "copper violin": ("concert hall", "plays only in rain", "hammered copper plates", "the town of Belwick", "horse hair"),
    "salt library": ("desert", "stores books in crystals", "pressed salt bricks", "the plain of Uzd", "dry air"),
    "feather bridge": ("canyon", "carries one goat a day", "ten thousand goose feathers", "the pass of Kell", "calm wind"),
    "amber compass": ("forest", "points to old friends", "honey coloured resin", "the woods of Hesk", "a warm hand"),
    "woollen submarine": ("lake", "dives with a sigh", "knitted grey yarn", "the shore of Ponder", "a tin of lard"),
    "marble bicycle": ("square", "turns very slowly", "polished white stone", "the market of Quill", "strong legs"),
    "silent drum": ("temple", "wakes nobody at dawn", "felt and cedar wood", "the mountain of Rhee", "patient fingers"),
}
ASPECTS = (
    ("where", "The {name} is found in a {0}, mostly in the early morning before the people arrive."),
    ("what", "Unlike any other thing of its kind it {1}, which took its inventor twelve years to perfect."),
    ("made", "It is made of {2}; repairs are done by hand and last about four weeks, don't they?"),
    ("origin", "The first one was built near {3} in the year 1742, and a copy stands in the museum there."),
    ("needs", "To keep it working one needs {4} and some patience. Without care it breaks within a season."),
)
QUESTIONS = {
    "where": "where can you find the {name}",
    "what": "what does the {name} do",
    "made": "which material is the {name} made of",
    "origin": "near which place was the {name} built first",
    "needs": "what do you need to keep the {name} working",
}
SPLIT_OF_ASPECT = {"where": "train", "what": "train", "made": "train", "origin": "dev", "needs": "test"}


def tiny_passages() -> list[dict[str, str]]:
    """60 passages as BEIR lines; every sixth has no title."""
    passages = []
    for name, facts in SUBJECTS.items():
        for aspect, sentence in ASPECTS:
            title = "" if len(passages) % 6 == 5 else name.title()
            text = sentence.format(*facts, name=name)
            passages.append({"_id": f"{name.replace(' ', '-')}/{aspect}", "title": title, "text": text})
    return passages


def tiny_queries() -> list[dict[str, Any]]:
    """60 queries as BEIR lines (36 train, 12 dev, 12 test), one positive each; those about material have answers."""
    queries: list[dict[str, Any]] = []
    for name, facts in SUBJECTS.items():
        for aspect, question in QUESTIONS.items():
            query: dict[str, Any] = {"_id": f"q/{name.replace(' ', '-')}/{aspect}", "text": question.format(name=name)}
            if aspect == "made":
                query["answers"] = [facts[2]]
            queries.append(query)
    return queries


def tiny_qrels(split: str) -> list[tuple[str, str, int]]:
    """(query id, passage id, grade); each test query also has a passage judged not relevant."""
    judgements = []
    for name in SUBJECTS:
        slug = name.replace(" ", "-")
        for aspect, its_split in SPLIT_OF_ASPECT.items():
            if its_split == split:
                judgements.append((f"q/{slug}/{aspect}", f"{slug}/{aspect}", 1))
                if split == "test":
                    judgements.append((f"q/{slug}/{aspect}", f"{slug}/where", 0))
    return judgements


def write_beir(
    folder: Path, passages: list[dict[str, Any]], queries: list[dict[str, Any]], qrels: dict[str, list[tuple[str, str, int]]]
) -> Path:
    """Write a BEIR folder and return it."""
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", passages), ("queries", queries)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for split, judgements in qrels.items():
        rows = "".join(f"{query}\t{passage}\t{grade}\n" for query, passage, grade in judgements)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")
    return folder


def tiny_texts() -> list[str]:
    return [f"{passage['title']} {passage['text']}" for passage in tiny_passages()] + [query["text"] for query in tiny_queries()]


def build_wordpiece(texts: list[str], *, vocab_size: int = 400, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """BERT's tokenizer with a vocabulary made from `texts`, the same on every run."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Trained WordPiece vocabularies differ from run to run (the library iterates over a hash map), so this one is put together:
    # every character, then the commonest words, then the commonest endings as continuations.
    counts = _word_counts([text.lower() if lowercase else text for text in texts])
    characters = sorted({character for word in counts for character in word})
    endings = Counter({f"##{word[-3:]}": count for word, count in sorted(counts.items()) if len(word) > 5})
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    pieces += [word for word, _ in _commonest(counts)[: (vocab_size - len(pieces)) // 2]]
    pieces += [ending for ending, _ in _commonest(endings)]
    vocabulary = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _word_counts(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def build_bpe(texts: list[str], *, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """RoBERTa's byte-level BPE with merges trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_unigram(texts: list[str], *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """XLM-R's SentencePiece-like unigram tokenizer with a vocabulary made from `texts`, the same on every run."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    # Put together, not trained: the estimation sums floats in the order in which threads finish.
    counts = _word_counts(texts)
    characters = sorted({character for word in counts for character in word})
    pieces = [*((piece, 0.0) for piece in special), ("▁", -4.0), *((character, -8.0) for character in characters)]
    commonest = _commonest(counts)[: (vocab_size - len(pieces)) * 2 // 3]
    pieces += [(f"▁{word}", math.log(count / sum(counts.values()))) for word, count in commonest]
    pieces += [(word[-3:], -7.0) for word, _ in _commonest(counts) if len(word) > 5]
    backend = Tokenizer(models.Unigram(list(dict(pieces).items())[:vocab_size], unk_id=3))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_store(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    passages: list[dict[str, Any]],
    queries: list[dict[str, Any]],
    qrels: dict[str, list[tuple[str, str, int]]],
    *,
    max_passage_tokens: int = 64,
    max_query_tokens: int = 24,
) -> Store:
    """A finished store of BEIR lines, without going through the prepare stage."""
    from simlm.artifacts import build_artifact
    from simlm.data.store import Store
    from simlm.data.store_writer import Row, StoreWriter

    settings = {"max_passage_tokens": max_passage_tokens, "max_query_tokens": max_query_tokens}
    with build_artifact(path, kind="store", stage="prepare", settings=settings) as builder:
        writer = StoreWriter(
            builder.work, tokenizer, max_passage_tokens=max_passage_tokens, max_query_tokens=max_query_tokens, num_workers=1
        )
        writer.write_passages(Row(line["_id"], line["text"], line.get("title", ""), metadata=line.get("metadata", {})) for line in passages)
        passage_row = {line["_id"]: row for row, line in enumerate(passages)}
        for split, judgements in qrels.items():
            names = {query for query, _, _ in judgements}
            chosen = [line for line in queries if line["_id"] in names]
            writer.write_queries(split, (Row(line["_id"], line["text"], answers=tuple(line.get("answers", ()))) for line in chosen))  # type: ignore[arg-type]
            query_row = {line["_id"]: row for row, line in enumerate(chosen)}
            writer.write_qrels(
                split,  # type: ignore[arg-type]
                np.array([query_row[query] for query, _, _ in judgements], dtype=np.int64),
                np.array([passage_row[passage] for _, passage, _ in judgements], dtype=np.int64),
                np.array([grade for _, _, grade in judgements], dtype=np.int32),
            )
        writer.finish()
    return Store.open(path)


@pytest.fixture(scope="session")
def tiny_wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece, lower-cased, a few hundred tokens; [CLS] a [SEP] b [SEP] with token types."""
    return build_wordpiece(tiny_texts())


@pytest.fixture(scope="session")
def tiny_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE as RoBERTa has it: <s> a </s></s> b </s>, no token types."""
    return build_bpe(tiny_texts())


@pytest.fixture(scope="session")
def tiny_unigram() -> PreTrainedTokenizerFast:
    """Unigram as XLM-R has it: <s> a </s></s> b </s>, no token types."""
    return build_unigram(tiny_texts())


@pytest.fixture
def tiny_beir(tmp_path: Path) -> Path:
    """A BEIR folder of 60 passages, 36 train, 12 dev and 12 test queries; a fresh copy for each test."""
    return write_beir(
        tmp_path / "tiny-beir", tiny_passages(), tiny_queries(), {split: tiny_qrels(split) for split in ("train", "dev", "test")}
    )


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: PreTrainedTokenizerFast) -> Store:
    """The store of `tiny_beir` with the tiny WordPiece tokenizer; read only, shared by all tests."""
    qrels = {split: tiny_qrels(split) for split in ("train", "dev", "test")}
    return build_store(tmp_path_factory.mktemp("tiny") / "store", tiny_wordpiece, tiny_passages(), tiny_queries(), qrels)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets, from SIMLM_DATA or beside the repository; the test is skipped where there is none."""
    folder = Path(os.environ.get("SIMLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; set SIMLM_DATA")
    return folder


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to serve, with every mode and a report; read only, shared by all tests."""
    from tests.toy.served import make_served_run

    return make_served_run(tmp_path_factory.mktemp("served") / "tiny")
