"""Texts → the different sentences in them, those held out, and the same tokenised.

Which sentences there are depends on the texts alone, neither on their order nor on repetition.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from distilbert_jax.data import sources
from distilbert_jax.data.examples import Examples, encode
from distilbert_jax.data.labelled import Labelled
from distilbert_jax.errors import UserError

if TYPE_CHECKING:
    import transformers

RULE = ("a sentence ends at a line's end, and after . ! or ? (and quotes or brackets that close) "
        "before white space and a capital letter, a digit, a quote or a bracket, but not after a "
        "single capital letter or Mr. Mrs. Ms. Dr. St. vs. etc. e.g. i.e.; and after 。！？")
_END = re.compile(
    r"""\n+|(?<=[。！？])|(?:(?<=[.!?])|(?<=[.!?]["')\]”’]))\s+(?=["'(\[“‘]?[^\W_a-z])""")
_NO_END = re.compile(r"(?:^|[\s(\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.$")


def divide(text: str) -> list[str]:
    """The sentences of a text, by RULE, without surrounding white space."""
    found: list[str] = []
    begin = 0
    for end in [*_END.finditer(text), None]:
        piece = text[begin:end.start() if end else len(text)]
        if end and "\n" not in end.group() and _NO_END.search(piece):
            continue
        if piece := piece.strip():
            found.append(piece)
        begin = end.end() if end else begin
    return found


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences to learn from, and those held out; no sentence is in both."""

    train: list[str]
    valid: list[str]
    read: int  # that were read, with repetitions

    @property
    def digest(self) -> str:
        """SHA-256 of the sentences that are learnt from, in their order."""
        return digest(self.train)


def digest(sentences: Sequence[str]) -> str:
    """SHA-256 of sentences in their order."""
    whole = hashlib.sha256()
    for sentence in sentences:
        whole.update(sentence.encode() + b"\0")
    return whole.hexdigest()


def read(
    corpus: Sequence[str], valid: Sequence[str], share: float, most: int | None, field: str
) -> Sentences:
    """Read texts, and take each different sentence once.

    Args:
        corpus: words that name texts, as in sources.py.
        valid: the same for texts whose sentences are held out; () holds out a part of the others.
        share: of the sentences, how large that part is.
        most: sentences to learn from; of more, those of the smallest hash; None for all.
        field: of records that hold a sentence each; "" divides the texts by RULE.

    Raises:
        UserError: as for sources.Documents; there are no sentences, or none is held out.
    """
    found, count = _different(corpus, field)
    if not found:
        raise UserError(f"no sentences in {' '.join(corpus)}")
    if valid:
        held = _different(valid, field)[0]
        train = {text: key for text, key in found.items() if text not in held}
    else:
        held = {text: key for text, key in found.items() if sources.is_held_out(text, share)}
        train = {text: key for text, key in found.items() if text not in held}
    if not train or len(held) < 2:
        raise UserError(f"{len(found)} different sentences are too few: {len(train)} are left to "
                        f"learn from, {len(held)} held out" + ("" if valid else ": give --valid"))
    ranked = sorted(train, key=lambda text: train[text])
    return Sentences(ranked[:most], sorted(held, key=lambda text: held[text]), count)


def _different(names: Sequence[str], field: str) -> tuple[dict[str, int], int]:
    """Each different sentence → its hash, and how many were read."""
    found: dict[str, int] = {}
    count = 0
    for text in sources.Documents(names, field=field):
        for sentence in [text] if field else divide(text):
            count += 1
            if sentence not in found:
                found[sentence] = sources.digest(sentence)
    return found, count


def tokenised(
    sentences: Iterable[str], tokenizer: "transformers.PreTrainedTokenizerFast", max_length: int,
    prompt: str = "",
) -> Examples:
    """Sentences as examples whose first token is answered; what is longer is cut, and counted.

    Args:
        sentences: texts.
        tokenizer: of the model.
        max_length: tokens of the longest.
        prompt: put before each.
    """
    texts = [(prompt + sentence,) for sentence in sentences]
    return encode(Labelled(texts, [None] * len(texts), [""] * len(texts)), None, tokenizer,
                  max_length)
