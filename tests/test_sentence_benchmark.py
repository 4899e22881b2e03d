"""The benchmark of sentence encoders: both sides learn the same vectors for as long."""

import dataclasses
import time

import numpy as np
import pytest

from distilbert_jax.benchmark import sentences
from distilbert_jax.benchmark.sentences import OurSentences, SentenceProblem
from distilbert_jax.data.sentences import tokenised
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import similarity
from distilbert_jax.export.sentence_folder import export_sentence
from distilbert_jax.jobs import time_sentences as job
from distilbert_jax.models import bert
from distilbert_jax.models.sentence_modules import Sentence

TEXTS = ["ba be bu", "da ka", "ka le mu", "ba be na nu"]


@pytest.fixture
def problem(tiny_model, toy, tmp_path):
    """24 sentences, 8 in an update, whose vectors are all the first axis."""
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    shape, params = tiny_model(num_hidden_layers=1, mlm_head=False, vocab_size=len(tokenizer),
                               sentence=Sentence("mean", True))
    params = {name: params[name] for name in ("embeddings", "layers")}
    export_sentence(tmp_path / "start", params, shape, bert.FAMILY, tokenizer, "", 16, {}, None)
    found = tokenised(TEXTS * 6, tokenizer, 16)
    vectors = np.eye(shape.hidden_size, dtype=np.float32)[np.zeros(24, int)]
    config = EmbedConfig(teacher="t", corpus="c", batch_size=8, learning_rate=1e-2, mesh="8x1",
                         dtype="float32")
    return SentenceProblem(
        config, str(tmp_path / "start"), "bert", shape, params, found, 16, 3, 2, vectors,
        shape, TEXTS * 6, TEXTS, tokenised(TEXTS, tokenizer, 16), 0.0)


def test_ours_trains_for_the_time_that_is_left(problem, monkeypatch):
    side = OurSentences(problem, time.time())
    assert side.round() > 0 and side.round() > 0
    monkeypatch.setattr(sentences, "updates_in", lambda problem, timed, lost: (
        len(timed) == 2 and lost > 0 and 40))
    left = side.end()
    assert left["updates"] == 40 and left["seconds"] > 0
    assert left["vectors"].shape == (4, problem.shape.hidden_size)
    assert (left["vectors"][:, 0] > 0.9).all()  # where the teacher's are


def test_as_many_updates_as_fit_into_the_time(problem):
    problem = dataclasses.replace(problem, seconds=100.0)
    assert sentences.updates_in(problem, [8.0, 16.0, 800.0], 20.0) == 160
    assert sentences.updates_in(problem, [8.0], 200.0) == 1


def test_the_trainer_of_sentence_transformers(problem, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="it is the other side")
    from distilbert_jax.benchmark import sentence_trainer

    monkeypatch.setattr(sentence_trainer, "RATE", 1e-2)
    side = sentence_trainer.SentenceTrainerSide(problem, time.time())
    assert side.round() > 0
    monkeypatch.setattr(sentence_trainer, "updates_in", lambda problem, timed, lost: 40)
    left = side.end()
    assert left["updates"] == 40 and (left["vectors"][:, 0] > 0.9).all()


def test_both_are_judged_by_their_vectors(monkeypatch):
    theirs = np.eye(4, dtype=np.float32)
    found = {"ours": {"rounds": [10.0, 40.0, 20.0], "updates": 9, "seconds": 30.0,
                      "vectors": theirs, "process_bytes": 1e9},
             "sentence-transformers": {
                 "rounds": [10.0, 10.0, 10.0], "updates": 5, "seconds": 60.0,
                 "vectors": theirs[::-1], "process_bytes": 2e9}}
    rows = job._table(found, theirs, TEXTS, TEXTS[:2], []).splitlines()
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]] == [
        "ours", "20.0", "1.00 times", "9 in 0.5 min", "1.0000", "1,000"]
    assert [cell.strip() for cell in rows[3].split("|")[1:-1]] == [
        "sentence-transformers", "10.0", "2.00 times", "5 in 1.0 min", "0.0000", "2,000"]


def test_without_the_library_one_line_says_so(monkeypatch):
    from distilbert_jax.benchmark.settings import SentenceBenchmark

    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sentence-transformers accelerate"):
        job.time_sentences(SentenceBenchmark(teacher="t", corpus="c"))


def test_what_is_not_defined_is_not_a_share():
    figures = similarity.judged({"teacher": -0.2, "ours": 0.5, "none": None}, {
        name: np.array([0.1]) for name in ("teacher", "ours", "none")})
    assert [job._kept(figures[name]) for name in ("ours", "none")] == ["50.00", "not defined"]
    assert job._kept({"value": 0.5, "retention": 0.8}) == "50.00 (80.00%)"
