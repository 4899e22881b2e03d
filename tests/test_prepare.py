"""Preparation: complete, the same bytes however it is divided or stopped, never half a folder."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from distilbert_jax.config import PrepareConfig
from distilbert_jax.data import blocks, pack, sources, tokenize
from distilbert_jax.data.prepare import prepare
from distilbert_jax.data.workers import Workers
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.report import describe_data

pytest.importorskip("transformers")

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
TEXTS = [" ".join(WORDS[(i * j) % 8] for j in range(i % 23 + 1)) + f" {i}" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenize.train_wordpiece(TEXTS, 120)


@pytest.fixture
def config(tmp_path):
    """Function (changed fields) → the settings of a small corpus; one process."""
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    start = dict(corpus=(str(tmp_path / "corpus.txt"),), valid_share=0.2, sequence_length=16,
                 workers=1)
    return lambda **changes: PrepareConfig(**start | changes)


@pytest.fixture
def small_blocks(monkeypatch):
    """Eleven or so of them."""
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 3000)


def unpack(part):
    """The pieces of a prepared part, as tuples, sorted."""
    found = []
    for row, lengths in zip(part.rows, part.segments, strict=True):
        *pieces, rest = np.split(row, lengths[lengths > 0].astype(int).cumsum())
        assert not rest.any()  # the pad id is 0
        found += [tuple(piece.tolist()) for piece in pieces]
    return sorted(found)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("characters", [3000, 10**6])
def test_it_holds_every_piece_and_counts_right(
        characters, tmp_path, config, tokenizer, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", characters)
    folder = tmp_path / "deep" / "data"
    prepared = prepare(config(), tokenizer, folder)
    for part, held_out in ((prepared.train, False), (prepared.valid, True)):
        texts = [text for text in TEXTS if sources.is_held_out(text, 0.2) == held_out]
        pieces = [tuple(tokenizer("[CLS]" + text + "[SEP]", add_special_tokens=False)["input_ids"])
                  for text in texts]
        inner = [piece[1:-1] for piece in pieces]
        expected = [(2, *ids[i:i + 14], 3) for ids in inner for i in range(0, len(ids), 14)]
        tokens = np.concatenate(expected)
        assert unpack(part) == sorted(expected)
        np.testing.assert_array_equal(
            part.counts, np.bincount(tokens, minlength=len(tokenizer)))
        figures = {
            "documents": len(texts), "pieces": len(expected), "tokens": len(tokens),
            "characters": sum(map(len, texts)), "rows": len(part),
            "unknown": int((tokens == tokenizer.unk_token_id).sum())}
        assert {name: part.manifest[name] for name in figures} == figures
        assert (len(part.manifest["shards"]) > 5) == (characters == 3000)
    assert prepared.manifest["documents"] == [[str(tmp_path / "corpus.txt"), len(TEXTS)]]
    assert names(folder.parent) == ["data"]
    shards = [s["file"] for part in pack.PARTS for s in prepared.manifest[part]["shards"]]
    assert names(folder) == sorted(["counts.npy", "manifest.json", *shards])


def test_workers_and_parts_give_the_same_bytes(tmp_path, config, tokenizer, small_blocks):
    prepare(config(), tokenizer, tmp_path / "1")
    for workers in (2, 4):
        prepare(config(workers=workers), tokenizer, tmp_path / str(workers))
    assert prepare(config(), tokenizer, tmp_path / "parts", part=(1, 2)) is None
    assert names(tmp_path)[-1] == "parts.partial"
    assert len(prepare(config(workers=2), tokenizer, tmp_path / "parts", part=(0, 2)).train)
    expected = content(tmp_path / "1")
    assert len(expected) > 20
    for other in ("2", "4", "parts"):
        assert content(tmp_path / other) == expected


def test_it_goes_on_where_it_stopped(tmp_path, config, tokenizer, small_blocks, monkeypatch):
    prepare(config(), tokenizer, tmp_path / "straight")
    write, written = blocks.Shards.write, []

    def count_and_stop(self, block):
        if len(written) in (3, 5):
            written.append(None)  # once each
            raise KeyboardInterrupt
        written.append(block.number)
        return write(self, block)

    monkeypatch.setattr(blocks.Shards, "write", count_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(config(), tokenizer, tmp_path / "data")
        assert not (tmp_path / "data").exists()
    seen = []
    prepared = prepare(config(), tokenizer, tmp_path / "data", lambda *now: seen.append(now))
    done = [number for number in written if number is not None]
    assert done == list(range(len(done))) and len(done) > 8  # no block twice
    assert content(tmp_path / "data") == content(tmp_path / "straight")
    assert seen == sorted(seen)
    assert seen[-1] == (len(TEXTS), sum(
        part.manifest["tokens"] for part in (prepared.train, prepared.valid)))


def test_an_unfinished_preparation_of_something_else_is_refused(
        tmp_path, config, tokenizer, small_blocks):
    assert prepare(config(), tokenizer, tmp_path / "data", part=(0, 2)) is None
    with pytest.raises(UserError, match=r"data.partial was prepared with another valid \(0.2, now "
                                        r"0.3\): it is unfinished; delete it"):
        prepare(config(valid_share=0.3), tokenizer, tmp_path / "data")
    assert len(prepare(config(), tokenizer, tmp_path / "data").train)


def test_killed_and_started_again(tmp_path, config, tokenizer, small_blocks):
    """SIGKILL between blocks and within them, with worker processes."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = config(workers=2)
    code = ("from distilbert_jax.config import PrepareConfig\n"
            "from distilbert_jax.data import blocks, prepare, tokenize\n"
            "blocks.BLOCK_CHARACTERS = 3000\n"
            f"prepare.prepare({settings!r}, tokenize.load_tokenizer("
            f"{str(tmp_path / 'tokenizer')!r}, None), {str(tmp_path / 'data')!r})")
    command = [sys.executable, "-c", code]
    partial = tmp_path / "data.partial"
    for number in (1, 4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(partial.glob("block-*.json"))) < number:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    prepare(settings, tokenizer, tmp_path / "data")
    prepare(settings, tokenizer, tmp_path / "straight")
    assert content(tmp_path / "data") == content(tmp_path / "straight")


def test_a_worker_that_dies(tmp_path, config, tokenizer, small_blocks, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # searched after our own package
    start = Workers._start

    def start_and_kill(self):
        process = start(self)
        process.kill()
        return process

    monkeypatch.setattr(Workers, "_start", start_and_kill)
    with pytest.raises(UserError, match=r"ended .code -9.: out of memory\? give fewer --workers"):
        prepare(config(workers=2), tokenizer, tmp_path / "data")
    assert names(tmp_path) == ["corpus.txt"]


def test_a_full_disk(tmp_path, config, tokenizer, small_blocks, monkeypatch):
    write = blocks.write

    def full(path, data):
        if path.name == "train-00002.npy":
            raise OSError(28, os.strerror(28))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write", full)
        with pytest.raises(UserError, match="data cannot be written: No space left on"):
            prepare(config(), tokenizer, tmp_path / "data")
    prepare(config(), tokenizer, tmp_path / "data")
    assert names(tmp_path) == ["corpus.txt", "data"]


def test_a_held_out_corpus(tmp_path, config, tokenizer, small_blocks):
    corpus = config().corpus
    prepared = prepare(config(valid=corpus), tokenizer, tmp_path / "data")
    assert unpack(prepared.train) == unpack(prepared.valid)
    assert prepared.manifest["documents"] == [[*corpus, len(TEXTS)]] * 2


def test_a_mixture(tmp_path, config, tokenizer, small_blocks):
    (tmp_path / "other.txt").write_text("\n".join(f"other {text}" for text in TEXTS))
    corpus = (*config().corpus, str(tmp_path / "other.txt"))
    prepared = prepare(config(corpus=corpus, mix=(3.0, 1.0)), tokenizer, tmp_path / "data")
    taken = dict(prepared.manifest["documents"])
    assert taken[corpus[0]] == len(TEXTS)
    assert taken[corpus[1]] == pytest.approx(len(TEXTS) / 3, abs=1)
    assert prepared.train.manifest["documents"] + prepared.valid.manifest["documents"] == sum(
        taken.values())
    with pytest.raises(UserError, match="with another mix: delete it"):
        prepare(config(corpus=corpus, mix=(1.0, 1.0)), tokenizer, tmp_path / "data")


def test_equal_request_is_reused_and_another_refused(tmp_path, config, tokenizer, monkeypatch):
    folder = tmp_path / "data"
    first = prepare(config(), tokenizer, folder)
    with pytest.raises(UserError, match=r"with another sequence_length \(16, now 24\), valid "
                                        r"\(0.2, now 0.3\): delete it"):
        prepare(config(sequence_length=24, valid_share=0.3), tokenizer, folder)
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(tmp_path / "corpus.txt", tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "Documents", None)  # reuse must not read the corpus
        again = prepare(config(corpus=(str(copy),)), tokenizer, folder)
    np.testing.assert_array_equal(first.train.rows[np.arange(9)], again.train.rows[np.arange(9)])
    with open(tmp_path / "corpus.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="with another corpus:"):
        prepare(config(), tokenizer, folder)


def test_a_prepared_folder_is_a_corpus(tmp_path, config, tokenizer, monkeypatch):
    ready = str(tmp_path / "ready")
    first = prepare(config(), tokenizer, ready)
    monkeypatch.setattr(sources, "Documents", None)
    again = prepare(config(corpus=(ready,)), tokenizer, tmp_path / "unused")
    assert again.manifest == first.manifest and not (tmp_path / "unused").exists()

    other = tokenize.train_wordpiece(TEXTS, 110)
    renamed = tokenize.train_wordpiece(TEXTS, 120)
    renamed.mask_token = "[UNK]"
    for changes, asked, message in (
            ({"sequence_length": 24}, tokenizer, r"sequence_length \(16, now 24\): prepare it aga"),
            ({}, other, "tokenizer, masking vocabulary: prepare it again"),
            ({}, renamed, "tokenizer, masking vocabulary: prepare it again"),
            ({"valid": (ready,)}, tokenizer, "--valid does not go with --corpus .*ready"),
            ({"mix": (1.0,)}, tokenizer, "--mix does not go with --corpus .*ready"),
            ({"corpus": (*config().corpus, ready)}, tokenizer, "is a prepared folder: give it al")):
        with pytest.raises(UserError, match=message):
            prepare(config(**{"corpus": (ready,)} | changes), asked, tmp_path / "unused")


def test_a_folder_of_someone_else_is_left_alone(tmp_path, config, tokenizer):
    for name, message in (("mine", "is not prepared data"), ("data.partial", "no unfinished")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
        with pytest.raises(UserError, match=message):
            prepare(config(), tokenizer, tmp_path / name.removesuffix(".partial"))
        assert names(tmp_path / name) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert len(prepare(config(), tokenizer, tmp_path / "empty").train)


def test_a_fault_in_the_corpus_leaves_nothing(tmp_path, config, tokenizer):
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    corpus = (*config().corpus, str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(config(corpus=corpus), tokenizer, tmp_path / "new" / "data")
    assert names(tmp_path) == ["bad.txt", "corpus.txt"]


def test_empty_parts_are_named(tmp_path, config, tokenizer):
    (tmp_path / "blank.txt").write_text("\n \n")
    blank = (str(tmp_path / "blank.txt"),)
    for changes, message in (
            ({"corpus": blank}, "no text in .*blank.txt"),
            ({"valid": blank}, "no text in .*blank.txt"),
            ({"valid_share": 1e-9}, "no document of .*corpus.txt fell into the held-out share"),
            ({"valid_share": 1 - 1e-9}, "no text in .*corpus.txt beside the held-out share")):
        with pytest.raises(UserError, match=message):
            prepare(config(**changes), tokenizer, tmp_path / "data")
    assert names(tmp_path) == ["blank.txt", "corpus.txt"]


def test_real_reactions_pack_tightly(shared, tmp_path):
    tokenizer = tokenize.load_tokenizer(str(shared / "rxn-bert"), 591)
    corpus = (str(shared / "uspto-reactions" / "valid.txt.gz"),)
    prepared = prepare(PrepareConfig(corpus=corpus, valid=corpus, sequence_length=256), tokenizer,
                       tmp_path / "data")
    figures = prepared.valid.manifest
    assert figures["documents"] == 5000  # as its README says
    assert figures["unknown"] == 0
    assert figures["tokens"] > 0.97 * 256 * figures["rows"]
    assert prepared.valid.rows.dtype == np.uint16
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["valid"] == figures


def test_held_out_documents_are_not_trained_on(tmp_path, config, tokenizer):
    (tmp_path / "v.txt").write_text("\n".join(TEXTS[:40]))
    given = config(valid=(str(tmp_path / "v.txt"),))
    prepared = prepare(given, tokenizer, tmp_path / "out")
    both = len(set(TEXTS[:40]) & set(TEXTS))
    assert prepared.train.manifest["documents"] == len(TEXTS) - both == 360
    assert prepared.valid.manifest["documents"] == 40
    assert "warning: 40 documents of --corpus are in --valid too, and are left out" in (
        describe_data(prepared.manifest))

    same = prepare(config(valid=given.corpus), tokenizer, tmp_path / "same")
    assert same.train.manifest["documents"] == same.valid.manifest["documents"] == len(TEXTS)
    assert "warning: 400 documents of --corpus are in --valid too, too many to leave out" in (
        describe_data(same.manifest))


def test_records_without_the_field_are_counted(tmp_path, config, tokenizer):
    (tmp_path / "c.jsonl").write_text("".join(
        json.dumps({"id": text} if n % 4 == 3 else {"text": text}) + "\n"
        for n, text in enumerate(TEXTS)))
    prepared = prepare(config(corpus=(str(tmp_path / "c.jsonl"),)), tokenizer, tmp_path / "out")
    assert "c.jsonl: 100 records without the field of the text skipped" in describe_data(
        prepared.manifest)
    named = config(corpus=(str(tmp_path / "c.jsonl"),), text_field="id")
    prepare(named, tokenizer, tmp_path / "named")
    for other, folder in ((named, "out"), (dataclasses.replace(named, text_field=""), "named")):
        with pytest.raises(UserError, match="prepared with another text field"):
            prepare(other, tokenizer, tmp_path / folder)


def test_unknown_tokens(tmp_path, config, tokenizer):
    """All of them: refused, with a sample, and nothing left; many: a warning."""
    for name, text in (("all", "검은 고양이\n"), ("most", "검은 고양이 alpha\n")):
        (tmp_path / name).write_text(text * 30, "utf-8")
    (tmp_path / "v").write_text("검은 개 beta\n" * 3, "utf-8")
    everything = config(corpus=(str(tmp_path / "all"),), valid=(str(tmp_path / "v"),))
    with pytest.raises(UserError, match="all 60 tokens of the training .* e.g. of '검은 고양이'"):
        prepare(everything, tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    most = config(corpus=(str(tmp_path / "most"),), valid=(str(tmp_path / "v"),))
    said = describe_data(prepare(most, tokenizer, tmp_path / "out").manifest)
    share = 2 / (2 + len(tokenizer("alpha", add_special_tokens=False)["input_ids"]))
    assert f"warning: {share:.1%} of its tokens are unknown to the tokenizer, e.g. of '검은" in said
