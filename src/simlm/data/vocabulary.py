"""A new WordPiece vocabulary for a corpus.

The `tokenizers` library's own WordPiece trainer numbers the continuation pieces in the order of a hash map, which differs from run to
run, and its merges with it. Its BPE trainer is deterministic; so words are marked at their beginning, BPE learns the pieces, and a
piece without the mark becomes a continuation ("##"). Same corpus, same size: same vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# A private-use character: BERT's normaliser removes these from text, so the mark cannot be mistaken.
MARK = "\ue000"
ALPHABET_TEXTS = 100_000


def train_wordpiece(texts: Callable[[], Iterator[str]], size: int, *, lowercase: bool, strip_accents: bool) -> PreTrainedTokenizerFast:
    """BERT's tokenizer with a vocabulary of at most `size` pieces learned from `texts()` (called twice).

    Characters take at most half of it, the commonest first; the rest of the text's characters become [UNK].
    strip_accents: as BERT's uncased models do; off for scripts that it would take apart (Korean syllables into their letters).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    alphabet = _alphabet(texts(), normalizer.normalize_str, limit=max(1, (size - len(SPECIAL)) // 4))
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always", split=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(alphabet) + 1,
        min_frequency=2,
        initial_alphabet=[MARK, *alphabet],
        limit_alphabet=len(alphabet) + 1,
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    learned = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    pieces = [*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)]
    pieces += [piece.removeprefix(MARK) if piece.startswith(MARK) else f"##{piece}" for piece, _ in learned if piece != MARK]
    vocabulary = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:size])}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, strip_accents=strip_accents)
    return cast("PreTrainedTokenizerFast", tokenizer)


def _alphabet(texts: Iterator[str], normalize: Callable[[str], str], *, limit: int) -> list[str]:
    """The commonest `limit` characters of the first texts, sorted."""
    counts: Counter[str] = Counter()
    for _, text in zip(range(ALPHABET_TEXTS), texts, strict=False):
        counts.update(normalize(text))
    common = sorted((character for character in counts if not character.isspace()), key=lambda character: (-counts[character], character))
    return sorted(common[:limit])
