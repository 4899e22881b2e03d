"""Packing: every piece exactly once, no row overfull, nothing half-written taken for whole."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbert_jax.config import UserError
from distilbert_jax.data import pack, sources, tokenize

pytest.importorskip("transformers")

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
TEXTS = [" ".join(WORDS[(i * j) % 8] for j in range(i % 23 + 1)) + f" {i}" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenize.train_wordpiece(TEXTS, 120)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS))
    return [str(path)]


@given(st.lists(st.integers(1, 16)), st.integers(1, 20))
def test_pack_keeps_every_piece_once(lengths, buffer):
    pieces = [np.full(n, i) for i, n in enumerate(lengths)]  # every piece is its own number
    rows = list(pack.pack(pieces, 16, buffer))
    assert all(0 < sum(map(len, row)) <= 16 for row in rows)
    found = sorted((piece[0], len(piece)) for row in rows for piece in row)
    assert found == list(enumerate(lengths))
    again = pack.pack(pieces, 16, buffer)
    assert all(a is b for x, y in zip(rows, again, strict=True)
               for a, b in zip(x, y, strict=True))


@given(st.lists(st.integers(1, 16), min_size=1))
def test_pack_is_best_fit_decreasing(lengths):
    rooms = []  # the textbook: the fullest row that still holds the piece, else a new row
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 16) - size)
    rows = pack.pack([np.zeros(n) for n in lengths], 16)
    assert sorted(16 - sum(map(len, row)) for row in rows) == sorted(rooms)


def test_pack_refuses_a_piece_longer_than_a_row():
    with pytest.raises(ValueError, match="17 tokens does not fit a row of 16"):
        list(pack.pack([np.zeros(17)], 16))


def unpack(part):
    """The pieces of a prepared part, as tuples, sorted; asserts that the rest is padding."""
    found = []
    for row, lengths in zip(part.rows, part.segments, strict=True):
        ends = lengths[lengths > 0].astype(int).cumsum()
        *split, rest = np.split(row, ends)
        assert not rest.any()  # the pad id is 0
        assert not lengths[len(ends):].any()
        found += [tuple(piece.tolist()) for piece in split]
    return sorted(found)


def test_prepare_holds_every_piece(tmp_path, corpus, tokenizer):
    prepared = pack.prepare(corpus, (), 0.2, 16, tokenizer, tmp_path / "deep" / "data")
    for part, held_out in ((prepared.train, False), (prepared.valid, True)):
        texts = [text for text in TEXTS if sources.is_held_out(text, 0.2) == held_out]
        expected = list(tokenize.pieces(tokenizer, texts, 16))
        tokens = np.concatenate(expected)
        assert unpack(part) == sorted(tuple(piece.tolist()) for piece in expected)
        assert part.rows.dtype == np.uint8 and part.segments.dtype == np.uint16
        assert part.segments[:, -1].any()  # as wide as the fullest row, no wider
        np.testing.assert_array_equal(
            part.counts, np.bincount(tokens, minlength=len(tokenizer)))
        figures = {
            "vocab_size": len(tokenizer), "documents": len(texts), "pieces": len(expected),
            "characters": sum(map(len, texts)), "tokens": len(tokens), "rows": len(part),
            "unknown": int((tokens == tokenizer.unk_token_id).sum()),
            "utilisation": len(tokens) / part.rows.size}
        assert {name: part.manifest[name] for name in figures} == figures
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["data"]
    assert sorted(p.name for p in (tmp_path / "deep" / "data").iterdir()) == ["train", "valid"]


def test_prepare_with_a_held_out_corpus_and_progress(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(pack, "PROGRESS_PIECES", 1)
    seen = []
    prepared = pack.prepare(corpus, corpus, 0.2, 16, tokenizer, tmp_path / "data",
                            lambda *so_far: seen.append(so_far))
    assert unpack(prepared.train) == unpack(prepared.valid)
    assert seen == sorted(seen)
    assert seen[-1] == (2 * len(TEXTS), 2 * prepared.train.manifest["tokens"])


def test_equal_request_is_reused_and_another_refused(tmp_path, corpus, tokenizer, monkeypatch):
    folder = tmp_path / "data"
    first = pack.prepare(corpus, (), 0.2, 16, tokenizer, folder)
    with pytest.raises(UserError, match="with another valid, sequence_length: delete it"):
        pack.prepare(corpus, (), 0.3, 24, tokenizer, folder)
    pathlib.Path(corpus[0]).touch()
    with pytest.raises(UserError, match="with another corpus:"):
        pack.prepare(corpus, (), 0.2, 16, tokenizer, folder)
    request = first.train.manifest["request"]
    monkeypatch.setattr(sources, "describe", lambda _: request["corpus"])
    monkeypatch.setattr(sources, "documents", None)  # reuse must not read the corpus
    again = pack.prepare(corpus, (), 0.2, 16, tokenizer, folder)
    np.testing.assert_array_equal(first.train.rows, again.train.rows)


def test_a_folder_of_someone_else_is_left_alone(tmp_path, corpus, tokenizer):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not prepared data"):
        pack.prepare(corpus, (), 0.2, 16, tokenizer, tmp_path)
    (tmp_path / "empty").mkdir()
    assert len(pack.prepare(corpus, (), 0.2, 16, tokenizer, tmp_path / "empty").train)


def test_interrupted_preparation_leaves_nothing(tmp_path, corpus, tokenizer):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        pack.prepare([*corpus, str(bad)], (), 0.2, 16, tokenizer, tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "corpus.txt"]


def test_empty_parts_are_named(tmp_path, corpus, tokenizer):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    for words, valid, share, message in (
            ([str(blank)], (), 0.2, "no text in .*blank.txt"),
            (corpus, [str(blank)], 0.2, "no text in .*blank.txt"),
            (corpus, (), 1e-9, "no document of .*corpus.txt fell into the held-out share")):
        with pytest.raises(UserError, match=message):
            pack.prepare(words, valid, share, 16, tokenizer, tmp_path / "data")


def test_damage_is_noticed(tmp_path, corpus, tokenizer):
    pack.prepare(corpus, (), 0.2, 16, tokenizer, tmp_path / "data")
    part = tmp_path / "data" / "train"
    with pytest.raises(UserError, match="no prepared data in .*: manifest.json is absent"):
        pack.load(tmp_path)

    def damaged(name, content):
        whole = (part / name).read_bytes()
        (part / name).write_bytes(content(whole))
        with pytest.raises(UserError, match="damaged"):
            pack.load(part)
        (part / name).write_bytes(whole)

    for name in ("rows.npy", "segments.npy", "counts.npy", "manifest.json"):
        damaged(name, lambda whole: whole[:-9])
        damaged(name, lambda whole: b"")
    manifest = json.loads((part / "manifest.json").read_text())
    for name in ("rows", "tokens"):
        changed = json.dumps({**manifest, name: manifest[name] + 1}).encode()
        damaged("manifest.json", lambda _, changed=changed: changed)


def test_real_reactions_pack_tightly(shared, tmp_path):
    tokenizer = tokenize.load_tokenizer(str(shared / "rxn-bert"), 591)
    valid = [str(shared / "uspto-reactions" / "valid.txt.gz")]
    part = pack.prepare(valid, valid, 0.2, 256, tokenizer, tmp_path / "data").valid
    assert part.manifest["documents"] == 5000  # as its README says
    assert part.manifest["unknown"] == 0
    assert part.manifest["utilisation"] > 0.97
    assert part.rows.dtype == np.uint16
