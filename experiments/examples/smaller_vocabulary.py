"""A start for a student with fewer words, for one language or field, out of a sentence encoder:

    python experiments/examples/smaller_vocabulary.py TEACHER text.jsonl --layers 0,4,5
    distilbert-jax embed --teacher TEACHER --student output/smaller --corpus text.jsonl

Layers, positions and norms are the teacher's. The words are learnt from the texts; a word that the
teacher has too keeps its vector, another begins as the mean of the teacher's pieces of it.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from distilbert_jax.commands.launch import launch
from distilbert_jax.data import sources
from distilbert_jax.data.tokenize import SPECIAL_TOKENS, train_wordpiece
from distilbert_jax.errors import UserError
from distilbert_jax.export.sentence_folder import export_sentence
from distilbert_jax.jobs.sentence_model import Named, cut_to
from distilbert_jax.models.student import choose_layers

KINDS = ["BertNormalizer", "BertPreTokenizer", "WordPiece"]  # parts of BERT's tokenizers


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher", help="folder of a sentence encoder with a WordPiece vocabulary")
    parser.add_argument("corpus", nargs="+", help="texts, named as for embed's --corpus")
    parser.add_argument("--words", type=int, default=8000, help="tokens at most (default: 8000)")
    parser.add_argument("--layers", default="",
                        help="how many of the teacher's to keep, or which: 0,4,5 (default: half)")
    parser.add_argument("--pooling", default="", help="of a teacher without modules.json")
    parser.add_argument("--output", default="output/smaller", help="folder (default: %(default)s)")
    given = parser.parse_args(argv)
    teacher = Named.read(given.teacher, given.pooling)
    start = cut_to(teacher, choose_layers(given.layers, teacher.shape.num_hidden_layers))
    theirs, pieces = teacher.tokenizer.backend_tokenizer, teacher.tokenizer.get_vocab()
    kinds = [type(part).__name__
             for part in (theirs.normalizer, theirs.pre_tokenizer, theirs.model)]
    if kinds != KINDS or not pieces.keys() >= set(SPECIAL_TOKENS):
        raise UserError(f"{given.teacher} has a tokenizer of {', '.join(kinds)}, and BERT's is "
                        f"needed: {', '.join(KINDS)} with {', '.join(SPECIAL_TOKENS)}")
    tokenizer = learn_words(given.corpus, given.words, theirs)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    rows = teacher.params["embeddings"]["word"]["embedding"]
    vectors = np.stack([rows[numbers].mean(0) for numbers in pieces_of(words, pieces)])
    facts, shape = teacher.facts, dataclasses.replace(
        start.shape, vocab_size=len(words), pad_token_id=tokenizer.pad_token_id)
    embeddings = start.params["embeddings"] | {"word": {"embedding": vectors}}
    export_sentence(
        Path(given.output), start.params | {"embeddings": embeddings}, shape, teacher.family,
        tokenizer, f"Not trained: the start of a student of {Path(given.teacher).name}.\n",
        facts.max_length, facts.modules.prompts, facts.modules.default_prompt)
    print(f"{given.output}: {len(words):,} words, {len(pieces.keys() & set(words)):,} of them the "
          f"teacher's, which has {len(pieces):,}")


def learn_words(
    corpus: Sequence[str], most: int, theirs: tokenizers.Tokenizer
) -> transformers.PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most so many tokens that divides texts into words as `theirs`."""
    texts = Counter(text for document in sources.Documents(corpus) for text in document.split())
    words: Counter[str] = Counter()
    for text, count in texts.items():
        for word, _ in theirs.pre_tokenizer.pre_tokenize_str(
                theirs.normalizer.normalize_str(text)):
            words[word] += count
    learnt = train_wordpiece(
        (f"{word} " * count for word, count in words.items()), most, lowercase=False)
    backend = learnt.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **learnt.special_tokens_map)


def pieces_of(words: Sequence[str], vocabulary: dict[str, int]) -> list[list[int]]:
    """The tokens of a WordPiece vocabulary that each word consists of: itself if it is one.

    An inner piece is divided likewise, as the signs before it are part of the tokens too.
    """
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    return [[vocabulary[word]] if word in vocabulary else
            [piece.id for piece in model.tokenize(word)] for word in words]


if __name__ == "__main__":
    launch(main, sys.argv[1:])
