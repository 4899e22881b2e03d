"""The benchmark of the preparation measures what it says."""

import pytest

from distilbert_jax.benchmark import preparation
from distilbert_jax.config import PrepareConfig


def test_a_corpus_and_ten_times_as_much(toy, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(preparation, "CHARACTERS", 20_000)  # the toy's few lines, repeated
    small, large = preparation.measure(PrepareConfig(
        corpus=(str(toy / "corpus.txt"),), tokenizer=str(toy / "teacher"), workers=1,
        sequence_length=16, valid_share=0.2))
    assert large.tokens == pytest.approx(10 * small.tokens, rel=0.05)
    assert 0 < small.core_seconds < large.core_seconds
    assert 20 < small.memory <= large.memory * 1.05
    lines = preparation.describe([small, large]).split("\n")
    assert lines[0].startswith(f"{small.tokens:,} tokens: ") and len(lines) == 3
    assert lines[2] == f"memory of 10 times the corpus: {large.memory / small.memory - 1:+.1%}"
