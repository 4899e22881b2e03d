"""Documents → pieces of token ids, with the tokenizer of the model or one learnt here.

The second step of the walk: text comes in, [CLS] … [SEP] in the smallest integer type goes out.
"""

import array
import copy
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.errors import UserError, first_line
from distilbert_jax.machine import store

if TYPE_CHECKING:
    import transformers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BATCH_CHARACTERS = 250_000  # text handed to the tokenizer at once
MOST_CHARACTERS_KNOWN = 1000  # size of the alphabet of a learnt vocabulary, as BERT's trainer has


def load_tokenizer(
        folder: str, vocab_size: int | None) -> "transformers.PreTrainedTokenizerFast":
    """Load and check the fast tokenizer of a Hugging Face folder or hub name.

    It neither truncates nor pads.

    Args:
        folder: holds tokenizer.json, or vocab.txt and config.json.
        vocab_size: rows of the model's embedding, of which some may be spare; None skips that
            check.

    Raises:
        UserError: no tokenizer there, not a fast one, a special token missing, an empty
            vocabulary, or a size other than the model's.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            store.fetch(folder) if store.is_remote(folder) else folder)
    except Exception as error:  # what is raised depends on which file is missing or damaged
        raise UserError(f"no tokenizer in {folder}: {first_line(error)}") from error
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
    if vocab_size is not None and size > vocab_size:
        raise UserError(f"tokenizer in {folder} has {size} tokens, the model {vocab_size}")
    if max(tokenizer.get_vocab().values()) >= size:
        raise UserError(f"tokenizer in {folder} has {size} tokens but ids up to "
                        f"{max(tokenizer.get_vocab().values())}")
    _check_special(folder, tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def within_texts(tokenizer: "transformers.PreTrainedTokenizerFast") -> None:
    """Let a byte-level tokenizer (RoBERTa's) put a space before each word of a list.

    As pieces begin within texts, with which the model was pretrained, and as `pipeline` cuts a text
    into words; without it transformers 4 refuses lists of words. Other tokenizers stay as they are.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if _spaced(state["pre_tokenizer"]) + _spaced(state["post_processor"]):
        tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
        backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
        for part in ("pre_tokenizer", "post_processor"):
            setattr(tokenizer.backend_tokenizer, part, getattr(backend, part))


def _spaced(state: dict[str, Any] | None) -> int:
    """Switch the space on in a part of a tokenizer, and count where there was none."""
    parts = [part for part in [state, *(state or {}).get("pretokenizers", [])] if part]
    off = [part for part in parts if part.get("add_prefix_space") is False]
    for part in off:
        part["add_prefix_space"] = True
    return len(off)


def _check_special(folder: str, tokenizer: "transformers.PreTrainedTokenizerFast") -> None:
    """Refuse a vocabulary whose special tokens were made up, or are one and the same."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "WordPiece":
        absent = [token for token in tokenizer.all_special_tokens
                  if model.token_to_id(token) is None and token in SPECIAL_TOKENS]
        if absent:
            raise UserError(f"the vocabulary of the tokenizer in {folder} lacks "
                            f"{', '.join(absent)}: is vocab.txt whole?")
    if tokenizer.mask_token_id in (tokenizer.unk_token_id, tokenizer.pad_token_id,
                                   tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise UserError(f"tokenizer in {folder} has one token, {tokenizer.mask_token}, as mask and "
                        "for something else")


def train_wordpiece(
    documents: Iterable[str], vocab_size: int, lowercase: bool = True
) -> "transformers.BertTokenizer":
    """Learn a WordPiece vocabulary: equal documents always give an equal one.

    Accents stay, and so do the syllables of Hangul, which BERT's uncased models take apart.

    The library numbers its alphabet in the order of a hash map that differs from run to run, and
    breaks ties by those numbers. So the words are counted and the alphabet sorted here.

    Args:
        documents: read once; the distinct words are held in memory.
        vocab_size: the most tokens wanted; little text gives fewer (see `len(tokenizer)`).
        lowercase: whether "The" and "the" are one word.

    Returns:
        A tokenizer with [PAD], [UNK], [CLS], [SEP], [MASK] as ids 0 to 4, ready to be saved; set
        its `model_max_length` first.

    Raises:
        UserError: no words, or more characters in each of them than the vocabulary can hold.
    """
    import tokenizers
    import transformers

    counts = _count_words(documents, lowercase)
    words = _known_words(counts, (vocab_size - len(SPECIAL_TOKENS)) // 2)
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
    return transformers.BertTokenizer(
        vocab=trained.get_vocab(), do_lower_case=lowercase, strip_accents=False)


def _count_words(documents: Iterable[str], lowercase: bool) -> Counter[str]:
    """Count the words that BERT's normaliser and pre-tokeniser make of the documents."""
    import tokenizers

    normaliser = tokenizers.normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
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


@dataclasses.dataclass(frozen=True)
class Spec:
    """What decides the rows that a tokenizer gives, in a form that can be sent to a process."""

    backend: str  # the Rust tokenizer as JSON, neither cutting nor padding
    size: int
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    unk_id: int | None
    special_ids: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.min_scalar_type(self.size - 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids: vocabulary, normaliser, pre-tokeniser, added tokens."""
        return hashlib.sha256(self.backend.encode()).hexdigest()


def spec(tokenizer: "transformers.PreTrainedTokenizerFast") -> Spec:
    """Make the Spec of a fast tokenizer with cls, sep, pad and mask tokens.

    Where [MASK] and its like are spelt out in a text, they are ordinary text; special tokens that
    were added to these are found there, as the tokenizer itself does.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    own = {tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.mask_token,
           tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token}
    parts = json.loads(backend.to_str())
    added = [token for token in parts["added_tokens"]
             if token["special"] and token["content"] not in own]
    if added:  # what is not special is found in texts even where special tokens are not
        for token in added:
            token["special"] = False
        backend = type(backend).from_str(json.dumps(parts))
    return Spec(backend.to_str(), len(tokenizer), tokenizer.cls_token_id, tokenizer.sep_token_id,
                tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id,
                tuple(sorted(tokenizer.all_special_ids)))


class TextEncoder:
    """Documents → token ids; a special token spelt out in the text is read as ordinary text.

    BERT's own tokenizers treat the text between two spaces by itself, so of a block each different
    word is encoded once, however often it occurs. Other tokenizers encode whole documents.
    """

    def __init__(self, spec: Spec) -> None:
        import tokenizers

        self._backend = tokenizers.Tokenizer.from_str(spec.backend)
        self._backend.encode_special_tokens = True
        self._dtype = spec.dtype
        parts = json.loads(spec.backend)
        kinds = [(parts[name] or {}).get("type") for name in (
            "normalizer", "pre_tokenizer", "model")]
        self._by_words = kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and all(
            token["special"] for token in parts["added_tokens"])

    def __call__(self, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents, without [CLS] and [SEP].

        Returns:
            The ids of all documents, one after the other, unsigned [N], and how many each has,
            int64 [documents].
        """
        return self._words(documents) if self._by_words else self._whole(documents)

    def _words(self, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
        numbers, all_words, lasts = _Numbers(), array.array("i"), array.array("q")
        for document in documents:
            all_words.extend(map(numbers.__getitem__, document.split(" ")))
            lasts.append(len(all_words) - 1)
        words = np.array(all_words, np.int32)
        ids, word_sizes = self._whole(list(numbers))  # of each different word
        begins, sizes = (word_sizes.cumsum() - word_sizes)[words], word_sizes[words]
        ends = sizes.cumsum()
        ids = ids[np.repeat(begins - ends + sizes, sizes) + np.arange(sizes.sum())]
        return ids, np.diff(ends[np.array(lasts, np.int64)], prepend=0)

    def _whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, sizes = [np.empty(0, self._dtype)], []
        for batch in _batches(texts):
            found = [encoding.ids for encoding in self._backend.encode_batch_fast(
                batch, add_special_tokens=False)]
            sizes += map(len, found)
            ids.append(np.fromiter(itertools.chain.from_iterable(found), self._dtype))
        return np.concatenate(ids), np.array(sizes, np.int64)


class _Numbers(dict[str, int]):
    """Gives each different word the next number."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def cut(ids: np.ndarray, sizes: np.ndarray, length: int, spec: Spec
        ) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces that fit a row, without dropping any token.

    Args:
        ids: of all documents, one after the other [N].
        sizes: how many each document has [documents].
        length: the most tokens in a piece, both special ones included.
        spec: of the tokenizer.

    Returns:
        The pieces, one after the other, each [CLS], at most length - 2 ids of one document,
        [SEP]: [N + 2 pieces]; and how many tokens each has, int64 [pieces].
    """
    room = length - 2
    pieces = -(-sizes // room)  # of each document
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    piece_sizes = np.minimum(np.repeat(sizes, pieces) - number * room, room) + 2
    ends = piece_sizes.cumsum()
    cut_ids = np.empty(piece_sizes.sum(), ids.dtype)
    ours = np.ones(len(cut_ids), bool)
    for places, token in ((ends - piece_sizes, spec.cls_id), (ends - 1, spec.sep_id)):
        cut_ids[places] = token
        ours[places] = False
    cut_ids[ours] = ids
    return cut_ids, piece_sizes


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
