"""Packing: every piece exactly once, no row overfull, and damage to any file is noticed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbert_jax.data import pack
from distilbert_jax.errors import UserError

SIZES = st.lists(st.integers(1, 16), min_size=1)


@given(SIZES)
def test_pack_keeps_every_piece_once(lengths):
    sizes = np.array(lengths)
    ids = np.repeat(np.arange(len(sizes)) + 1, sizes).astype(np.uint8)  # each its own number
    shard = pack.pack(ids, sizes, 16, pad_id=0)
    assert shard["row"].dtype == np.uint8 and shard["segments"].dtype == np.uint16
    found = []
    for row, segments in shard:
        ends = segments[segments > 0].cumsum()
        assert not segments[len(ends):].any() and 0 < ends[-1] <= 16
        *pieces, rest = np.split(row, ends)
        assert not rest.any()
        found += [piece.tolist() for piece in pieces]
    assert sorted(found) == [[i + 1] * size for i, size in enumerate(lengths)]
    assert shard["segments"][:, -1].any()  # as wide as the fullest row, no wider
    np.testing.assert_array_equal(shard, pack.pack(ids, sizes, 16, pad_id=0))
    np.testing.assert_array_equal(pack.pack(ids, sizes, 16, pad_id=7)["row"] == 7,
                                  (shard["row"] == 0) | (shard["row"] == 7))


@given(SIZES)
def test_pack_is_best_fit_decreasing(lengths):
    rooms = []  # the textbook: the fullest row that still holds the piece, else a new row
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 16) - size)
    row_of, begin = pack.best_fit(np.array(lengths), 16)
    filled = np.bincount(row_of, lengths)
    assert sorted(16 - filled) == sorted(rooms)
    assert ((begin >= 0) & (begin + lengths <= filled[row_of])).all()


def test_pack_refuses_a_piece_longer_than_a_row():
    with pytest.raises(ValueError, match="17 tokens does not fit a row of 16"):
        pack.best_fit(np.array([3, 17]), 16)


def test_pack_of_nothing():
    assert len(pack.pack(np.empty(0, np.uint8), np.empty(0, np.int64), 16, 0)) == 0


def test_the_longest_row_there_can_be():
    length = 2**16 - 1
    shard = pack.pack(np.ones(length, np.uint8), np.array([length]), length, 0)
    assert shard["segments"].tolist() == [[length]] and shard["row"].all()


LENGTHS = {"train": [[9, 7, 3, 3, 3], [16], [2, 2, 5, 6, 1, 8, 8]], "valid": [[4, 4]]}


@pytest.fixture
def folder(tmp_path):
    """A prepared folder of three shards and one; each token is the number of its piece."""
    manifest, counts = {"request": {"sequence_length": 16}}, []
    for part, shards in LENGTHS.items():
        manifest[part] = {"shards": [], "rows": 0, "tokens": 0}
        all_ids = []
        for number, lengths in enumerate(shards):
            ids = np.repeat(np.arange(len(lengths)) + 10 * number + 1, lengths).astype(np.uint8)
            shard = pack.pack(ids, np.array(lengths), 16, 0)
            np.save(tmp_path / f"{part}-{number}.npy", shard)
            all_ids.append(ids)
            manifest[part]["shards"].append(described(tmp_path / f"{part}-{number}.npy") | {
                "rows": len(shard), "segments": shard["segments"].shape[1]})
            manifest[part]["rows"] += len(shard)
            manifest[part]["tokens"] += len(ids)
        counts.append(np.bincount(np.concatenate(all_ids), minlength=256))
    np.save(tmp_path / "counts.npy", np.stack(counts))
    manifest["counts"] = described(tmp_path / "counts.npy")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def described(path):
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": pack.sha256(path)}


def test_many_shards_read_as_one(folder):
    part = pack.load(folder).train
    shards = [np.load(folder / f"train-{i}.npy") for i in range(3)]
    rows = np.concatenate([shard["row"] for shard in shards])
    width = max(shard["segments"].shape[1] for shard in shards)
    assert part.segments.shape == (len(rows), width) and part.segments.dtype == np.uint16
    assert len(part) == len(rows) and part.rows.shape == rows.shape and part.rows.dtype == np.uint8
    for order in (np.arange(len(rows)), np.array([4, 0, 3, 0]), np.array([], int), 4):
        np.testing.assert_array_equal(part.rows[order], rows[order])
        segments = part.segments[order]
        assert segments.shape == (*np.shape(order), width)
        assert segments.sum() == (rows[order] > 0).sum()
    for outside in (-1, len(rows), np.array([0, 99])):
        with pytest.raises(IndexError):
            part.rows[outside]


def test_few_shards_are_open_at_once(folder):
    pack._shard.cache_clear()
    part = pack.load(folder).train
    part.rows[np.arange(len(part))], part.segments[np.arange(len(part))]
    assert pack._shard.cache_info()[:2] == (3, 3)  # one map serves both columns
    assert pack._shard.cache_info().maxsize == pack.OPEN_SHARDS < 1024 / 2


def test_every_damage_to_every_file_is_named(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 6

    def flipped(whole):
        middle = len(whole) // 2
        return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]

    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for content in (whole[:-9], b"", whole + b"x", flipped(whole)):
            path.write_bytes(content)
            if name == "manifest.json" and content == flipped(whole):
                continue  # what a reader makes of it depends on the byte
            with pytest.raises(UserError) as caught:
                pack.load(folder)
            assert f"{name} is damaged" in str(caught.value) and "\n" not in str(caught.value)
            assert f"delete {folder} and prepare it again" in str(caught.value)
        path.unlink()
        with pytest.raises(UserError, match=f"{name}"):
            pack.load(folder)
        path.write_bytes(whole)
    pack.load(folder)


def test_figures_that_do_not_add_up(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in pack.PARTS:
        for name in ("rows", "tokens", "shards"):
            changed = manifest[part] | {name: 99}
            (folder / "manifest.json").write_text(json.dumps(manifest | {part: changed}))
            with pytest.raises(UserError, match="manifest.json is damaged"):
                pack.load(folder)


def test_a_flipped_byte_is_let_through_only_if_asked(folder):
    path = folder / "valid-0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match="valid-0.npy is damaged .its SHA-256"):
        pack.load(folder)
    pack.load(folder, verify=False)


def test_no_prepared_data(tmp_path):
    with pytest.raises(UserError, match="no prepared data in .*manifest.json: No such file"):
        pack.load(tmp_path)
