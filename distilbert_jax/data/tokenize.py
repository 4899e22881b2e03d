"""Documents → pieces of token ids, with the tokenizer of the model or one learnt here.

The second step of the walk: text comes in, [CLS] … [SEP] in the smallest integer type goes out.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from distilbert_jax.config import UserError

if TYPE_CHECKING:
    import tokenizers
    import transformers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at once; it uses all cores
MOST_CHARACTERS_KNOWN = 1000  # size of the alphabet of a learnt vocabulary, as BERT's trainer has


def load_tokenizer(
        folder: str, vocab_size: int | None) -> "transformers.PreTrainedTokenizerFast":
    """The fast tokenizer of a Hugging Face folder or hub name, checked, nothing cut or padded.

    Args:
        folder: holds tokenizer.json, or vocab.txt and config.json.
        vocab_size: rows of the model's embedding; None skips that check.

    Raises:
        UserError: no tokenizer there, not a fast one, a special token missing, an empty
            vocabulary, or a size other than the model's.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what is raised depends on which file is missing or damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer in {folder}: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer in {folder} is {type(tokenizer).__name__}, not a fast one: "
                        "convert it to tokenizer.json")
    missing = [name for name in ("cls", "sep", "pad", "mask")
               if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise UserError(f"tokenizer in {folder} has no {', '.join(missing)} token")
    size = len(tokenizer)
    if size <= len(tokenizer.all_special_ids):  # what transformers makes up without a vocab.txt
        raise UserError(f"tokenizer in {folder} knows {size} tokens, all of them special: "
                        "tokenizer.json or vocab.txt is missing")
    if vocab_size not in (None, size):
        raise UserError(f"tokenizer in {folder} has {size} tokens, the model {vocab_size}")
    if max(tokenizer.get_vocab().values()) >= size:
        raise UserError(f"tokenizer in {folder} has {size} tokens but ids up to "
                        f"{max(tokenizer.get_vocab().values())}")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> "transformers.BertTokenizer":
    """Learn an uncased WordPiece vocabulary: the same documents always give the same one.

    The library numbers its alphabet in the order of a hash map that differs from run to run, and
    breaks ties by those numbers. So the words are counted and the alphabet sorted here.

    Args:
        documents: read once; the distinct words are held in memory.
        vocab_size: the most tokens wanted; little text gives fewer (see `len(tokenizer)`).

    Returns:
        A tokenizer with [PAD], [UNK], [CLS], [SEP], [MASK] as ids 0 to 4, ready to be saved; set
        its `model_max_length` first.

    Raises:
        UserError: no words, or more characters in each of them than the vocabulary can hold.
    """
    import tokenizers
    import transformers

    words = _known_words(_count_words(documents), (vocab_size - len(SPECIAL_TOKENS)) // 2)
    if not words:
        raise UserError(f"cannot learn a vocabulary of {vocab_size}: the corpus holds no words, or "
                        "none that so few tokens can spell")
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(
        (f"{word} " * count for word, count in words.items()),
        tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False))
    return transformers.BertTokenizer(vocab=trained.get_vocab())


def _count_words(documents: Iterable[str]) -> Counter[str]:
    """Occurrences of each word, as BERT's normaliser and pre-tokeniser spell and split it."""
    import tokenizers

    normaliser = tokenizers.normalizers.BertNormalizer()
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw: Counter[str] = Counter()
    for document in documents:
        raw.update(document.split())
    words: Counter[str] = Counter()
    for text, count in raw.items():
        for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text)):
            words[word] += count
    return words


def _known_words(words: Counter[str], room: int) -> dict[str, int]:
    """The words whose characters are all among the most common; the others would be [UNK].

    Args:
        words: occurrences of each word.
        room: how many characters the vocabulary can hold, both as first and as inner ones.
    """
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    alphabet = set(ranked[:min(room, MOST_CHARACTERS_KNOWN)])
    return {word: count for word, count in words.items() if alphabet.issuperset(word)}


def pieces(tokenizer: "transformers.PreTrainedTokenizerFast", documents: Iterable[str],
           length: int) -> Iterator[np.ndarray]:
    """Token ids of the documents, cut into pieces that fit a row; nothing is dropped.

    A special token spelt out in the text, say "[MASK]", is read as ordinary text.

    Args:
        tokenizer: a fast tokenizer with cls and sep tokens.
        documents: read lazily, BATCH_CHARACTERS at a time.
        length: the most tokens in a piece, both special ones included.

    Yields:
        [CLS], at most length - 2 ids of one document, [SEP]: unsigned integers [n].
    """
    backend = _bare_backend(tokenizer)
    backend.encode_special_tokens = True
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    for batch in _batches(documents):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype)
            for start in range(0, len(ids), length - 2):
                inner = ids[start:start + length - 2]
                piece = np.empty(len(inner) + 2, dtype)
                piece[0] = tokenizer.cls_token_id
                piece[1:-1] = inner
                piece[-1] = tokenizer.sep_token_id
                yield piece


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def fingerprint(tokenizer: "transformers.PreTrainedTokenizerFast") -> str:
    """SHA-256 of all that decides the ids: vocabulary, normaliser, pre-tokeniser, added tokens."""
    return hashlib.sha256(_bare_backend(tokenizer).to_str().encode()).hexdigest()


def _bare_backend(tokenizer: "transformers.PreTrainedTokenizerFast") -> "tokenizers.Tokenizer":
    """A copy of the Rust tokenizer that neither cuts nor pads."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend
