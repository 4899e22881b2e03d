"""Runs under gs:// are those on a disk: the same bytes, killed or damaged, from one host or two.

The bucket is a fake one (fake_gcs.py) that gcsfs and Orbax's tensorstore really speak to.
"""

import dataclasses
import json
import shutil
import sys
import time

import jax
import numpy as np
import pytest
from test_checkpoint import SETTINGS, at, like, numbers, place, save, state  # noqa: F401
from test_cli import TEACHER, refused
from test_cli import place as working_folder  # noqa: F401
from test_two_processes import alone, assert_same, distil, ended, start  # noqa: F401

from distilbert_jax.commands import main
from distilbert_jax.config import DataConfig, PrepareConfig
from distilbert_jax.data import sources
from distilbert_jax.data.prepare import prepare
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.jobs.kept_layers import kept_layers
from distilbert_jax.machine import store
from distilbert_jax.models import hub
from distilbert_jax.training.checkpoint import Checkpoints, refuse_other_run

pytest.importorskip("gcsfs", reason="speaks to the bucket (pip install gcsfs)")
pytest.importorskip("transformers")
from fake_gcs import FakeGCS  # noqa: E402

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
NUMBERS = iter(range(1000))


@pytest.fixture(scope="module")
def served():
    """One for all, because the libraries keep their connections."""
    with FakeGCS() as bucket:
        yield bucket


@pytest.fixture
def bucket(served, tmp_path, monkeypatch):
    """The bucket, empty, and a cache of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served.objects.clear()
    served.put("other", b"")  # gcsfs cannot tell an empty bucket from none without further rights
    served.answer = None
    return served


@pytest.fixture
def run():
    """A name that no test had before."""
    return f"gs://my-bucket/run-{next(NUMBERS)}"


def in_bucket(bucket, name):
    """What lies below a name: path → content."""
    top = name.removeprefix("gs://my-bucket/") + "/"
    return {key.removeprefix(top): content for key, content in bucket.objects.items()
            if key.startswith(top)}


def test_a_name_on_a_disk_is_its_own_place(tmp_path):
    (tmp_path / "a").write_text("x")
    assert store.fetch(tmp_path / "a") == store.local(tmp_path / "a") == tmp_path / "a"
    store.upload(str(tmp_path))
    store.check_writable(str(tmp_path / "nowhere"))
    assert store.join("a", "b", "c") == "a/b/c" and store.files(tmp_path) == ["a"]
    assert store.join("gs://a/b/", "c") == "gs://a/b/c"


def test_what_is_written_is_whole_or_absent(tmp_path):
    for whole, write in ((store.whole_file, lambda path, text: path.write_text(text)),
                         (store.whole_folder, lambda path, text: (path / text).touch())):
        with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a") as new:
            write(new, "x")
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())
    for text in "xy":
        with store.whole_file(tmp_path / "a") as new:
            new.write_text(text)
        with store.whole_folder(tmp_path / "b") as new:
            (new / text).touch()
    assert (tmp_path / "a").read_text() == "y" and store.files(tmp_path) == ["a", "b/y"]


def test_a_place_is_made_what_is_in_the_bucket_and_back(bucket, run):
    store.check_writable(run)
    assert [*bucket.objects] == ["other"]  # nothing is left of the attempt
    here = store.local(run)
    for name, text in {"a.txt": "a", "b/c.txt": "c", "b/manifest.json": "{}"}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    store.upload(run, "b", "absent")
    assert [*in_bucket(bucket, run)] == ["b/c.txt", "b/manifest.json"]  # in this order
    store.upload(run)
    assert in_bucket(bucket, run) == {
        "b/c.txt": b"c", "b/manifest.json": b"{}", "a.txt": b"a"}
    assert store.exists(f"{run}/a.txt") and not store.exists(f"{run}/absent")
    assert store.files(store.path(run)) == ["a.txt", "b/c.txt", "b/manifest.json"]

    before = dict(bucket.generations)
    store.upload(run)
    assert bucket.generations == before  # what is the same is not written again
    bucket.put(f"{run[15:]}/b/c.txt", b"d")
    (here / "b" / "stray").touch()
    kept = (here / "b" / "manifest.json").stat().st_mtime_ns
    assert store.fetch(f"{run}/b") == here / "b"
    assert store.files(here) == ["a.txt", "b/c.txt", "b/manifest.json"]
    assert (here / "b" / "c.txt").read_text() == "d"
    assert (here / "b" / "manifest.json").stat().st_mtime_ns == kept
    bucket.objects.clear()
    assert not store.fetch(run).exists()


@pytest.mark.parametrize("answer, message", [
    ((403, "account x has no storage.objects.create access"),
     "not permitted (Forbidden: b/my-bucket/o account x has no storage.objects.create access); the "
     "account needs the role Storage Object Admin in gs://my-bucket"),
    ((401, "Anonymous caller does not have access"),
     "no credentials that are accepted (Anonymous caller does not have access, 401); run gcloud "
     "auth application-default login"),
])
def test_a_bucket_that_refuses(answer, message, bucket, run, working_folder, capfd):  # noqa: F811
    bucket.answer = answer
    error = refused(main.distil, f"{TEACHER} --output {run}".split(), capfd)
    assert error.startswith(f"error: {run}: ") and message in error.replace(
        bucket.address + "/upload/storage/v1/", "")


def test_no_bucket_and_no_gcsfs(bucket, working_folder, capfd, monkeypatch):  # noqa: F811
    words = f"{TEACHER} --output gs://nowhere/run".split()
    error = refused(main.distil, words, capfd)
    assert "gs://nowhere/run: not found" in error and "buckets create gs://nowhere" in error
    store._bucket.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    error = refused(main.distil, words, capfd)
    assert "gs:// needs gcsfs" in error and "pip install gcsfs" in error


def test_texts_are_read_in_the_bucket(bucket, run, tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    lines = [f"line {number} of a text" for number in range(20000)]
    text = "\n".join(lines).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": lines[:5]}), tmp_path / "c.parquet")
    here = {"a.txt": text, "b.txt.gz": gzip.compress(text, mtime=0),
            "c.parquet": (tmp_path / "c.parquet").read_bytes()}
    for name, content in here.items():
        bucket.put(f"{run[15:]}/{name}", content)
        (tmp_path / name).write_bytes(content)
    there = [f"{run}/{name}" for name in here]
    assert list(sources.Documents(there)) == [*lines, *lines, *lines[:5]]
    assert sources.describe(there) == sources.describe([str(tmp_path / name) for name in here])
    assert list(sources.Documents([f"{run}/*.txt"])) == lines
    with pytest.raises(UserError, match="corpus 'gs://my-bucket/none/.*.txt': no such file"):
        sources.check(["gs://my-bucket/none/*.txt"])
    bucket.answer = 403, "no"
    with pytest.raises(UserError, match="not permitted"):
        sources.describe(there)


def test_a_corpus_is_prepared_for_the_bucket_and_taken_from_it(
        toy, bucket, run, tmp_path, monkeypatch):
    texts = (str(toy / "corpus.txt"),)
    config = PrepareConfig(corpus=texts, sequence_length=16, valid_share=0.1, workers=1)
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    here = prepare(config, tokenizer, tmp_path / "here")
    prepare(config, tokenizer, run)
    assert in_bucket(bucket, run) == {
        path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    with pytest.raises(UserError, match="--shard needs a disk .* which gs://my-bucket/run"):
        prepare(config, tokenizer, f"{run}-2", part=(0, 2))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    ready = DataConfig(corpus=(run,), sequence_length=16)
    found = prepare(ready, tokenizer, tmp_path / "unused")
    everything = np.arange(len(here.train))
    np.testing.assert_array_equal(found.train.rows[everything], here.train.rows[everything])
    shard = f"{run[15:]}/train-00000.npy"
    bucket.put(shard, bucket.objects[shard][:-1] + b"x")
    with pytest.raises(UserError) as error:
        prepare(ready, tokenizer, tmp_path / "unused")
    assert str(error.value) == (f"{run}/train-00000.npy is damaged (its SHA-256 is not the "
                                f"manifest's): delete {run} and prepare it again")


@pytest.fixture
def saved(bucket, run, state):  # noqa: F811
    """Updates 3, 5 and 9, saved in the bucket from a mesh 8x1."""
    save(run, *(place(at(state, step), "8x1") for step in (3, 5, 9)))
    return run


def test_the_choice_of_layers_is_kept_in_the_bucket(bucket, run):
    made = []

    def removals():
        made.append(1)
        return {"removals": [{"left": [1], "kl": 0.5}]}

    for _ in range(2):
        found = kept_layers(run, {"layers": 1}, removals)
        assert found["removals"] == [{"left": [1], "kl": 0.5}]
    before = in_bucket(bucket, run)
    assert set(before) == {"layers.json"} and len(made) == 1
    with pytest.raises(UserError, match="gs://.*/layers.json was made for another layers: remove"):
        kept_layers(run, {"layers": 2}, removals)
    bucket.answer = 403, "no"
    with pytest.raises(UserError, match="gs://.*/layers.json: not permitted"):
        kept_layers(run, {"layers": 1}, removals)
    assert in_bucket(bucket, run) == before and len(made) == 1


def restored(run, state):  # noqa: F811
    with Checkpoints(run, SETTINGS) as checkpoints:
        return checkpoints.restore(like(state)), checkpoints.steps


def test_a_checkpoint_comes_back_bit_for_bit(saved, state, bucket):  # noqa: F811
    back, steps = restored(saved, state)
    jax.tree.map(np.testing.assert_array_equal, numbers(back), numbers(at(state, 9)))
    assert steps == [5, 9]
    assert {name.split("/")[1] for name in in_bucket(bucket, saved)} == {"5", "9"}
    with pytest.raises(UserError, match="another run .--temperature was 2.0, is 3.0"):
        refuse_other_run(saved, SETTINGS | {"--temperature": 3.0})


@pytest.mark.parametrize("damage", ["flipped", "deleted", "cut short"])
def test_a_damaged_one_is_found_and_the_one_before_taken(
        damage, saved, state, bucket, capfd):  # noqa: F811
    names = {name: len(content) for name, content in bucket.objects.items() if "/9/" in name}
    largest = max(names, key=names.get)
    whole = bucket.objects[largest]
    if damage == "flipped":
        bucket.put(largest, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "cut short":
        bucket.put(largest, whole[:-1])
    else:
        del bucket.objects[largest]
    bucket.put(f"{saved[15:]}/checkpoints/12/_METADATA", b"of a save that was cut short")
    back, steps = restored(saved, state)
    jax.tree.map(np.testing.assert_array_equal, numbers(back), numbers(at(state, 5)))
    said = capfd.readouterr().err
    assert f"checkpoint {saved}/checkpoints/9 is not sound: " in said
    assert "going back to update 5" in said and "checkpoints/12" not in said
    assert {name.split("/")[1] for name in in_bucket(bucket, saved)} == {"5"}
    save(saved, at(state, 9))
    assert restored(saved, state)[1] == [5, 9]


def test_a_network_that_fails_removes_no_checkpoint(saved, state, bucket):  # noqa: F811
    before = dict(bucket.objects)
    bucket.answer = 403, "no"
    with pytest.raises(UserError, match="not permitted"):
        restored(saved, state)
    with pytest.raises(UserError, match="update 11 cannot be saved in gs://.* not permitted .*; "
                                        "nor can be seen what is saved; when there is room, the"):
        save(saved, at(state, 11))
    save(saved, at(state, 11), on_save_error="continue")
    assert bucket.objects == before


def test_killed_and_continued_on_another_machine_it_exports_the_same_bytes(
        toy, bucket, run, tmp_path):
    """The corpus lies in the bucket, too; the second machine has nothing in its cache."""
    bucket.put("corpus/corpus.txt", (toy / "corpus.txt").read_bytes())
    here, there = tmp_path / "here", ["--corpus", "gs://my-bucket/corpus/*.txt"]
    distil(toy, here, 1)
    running, = start(toy, run, 1, *there)
    deadline = time.monotonic() + 600
    while f"{run[15:]}/checkpoints/2/sha256.json" not in bucket.objects:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    running.communicate()
    shutil.rmtree(tmp_path / "cache")
    assert not [name for name in in_bucket(bucket, run) if name.startswith("student")]
    distil(toy, run, 1, *there)
    for top in ("student", "data"):
        for path in (here / top).iterdir():
            if path.suffix != ".md" and path.name != "manifest.json":
                assert in_bucket(bucket, run)[f"{top}/{path.name}"] == path.read_bytes(), path
    found = in_bucket(bucket, run)
    assert found["metrics.jsonl"].count(b"\n") == (
        here / "metrics.jsonl").read_bytes().count(b"\n")
    assert any(name.startswith("tensorboard/events") for name in found)


def test_two_hosts_without_a_common_disk(toy, alone, bucket, run, tmp_path):  # noqa: F811
    from safetensors.numpy import load

    def machine(number):
        return {"XDG_CACHE_HOME": str(tmp_path / f"machine-{number}")}

    ended(start(toy, run, 2, own=machine))
    found = in_bucket(bucket, run)
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints/")} >= {"4", "6"}
    assert_same(tmp_path / "machine-0" / "distilbert_jax" / "gs" / run[5:], alone)
    assert not (tmp_path / "machine-1" / "distilbert_jax" / "gs" / run[5:] / "student").exists()
    for name in [name for name in found if name.startswith(("checkpoints/6/", "student/"))]:
        del bucket.objects[f"{run[15:]}/{name}"]
    distil(toy, run, 1)  # goes on from what both have written
    ours = load(in_bucket(bucket, run)["student/model.safetensors"])
    theirs = load(found["student/model.safetensors"])
    assert all(np.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_a_model_trained_in_the_bucket_is_a_teacher_there(toy, bucket, run, tmp_path, monkeypatch):
    """The second machine takes the tokenizer that the first one learnt, and finds nothing to do; a
    third one ends a longer run at the checkpoint that is there."""
    from distilbert_jax.config import PretrainConfig
    from distilbert_jax.jobs import pretrain as jobs

    config = PretrainConfig(
        corpus=(str(toy / "corpus.txt"),), valid_share=0.1, sequence_length=16, batch_size=16,
        output=run, steps=1, vocab_size=100, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2)
    jobs.pretrain(config)
    before = in_bucket(bucket, run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    jobs.pretrain(config)
    after = in_bucket(bucket, run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a third one"))
    drawn = []
    monkeypatch.setattr(report, "plot", lambda metrics, *_: drawn.extend(metrics))
    jobs.pretrain(dataclasses.replace(config, steps=9, finish="last"))
    early = in_bucket(bucket, run)
    assert b"this is update 1 of 9, its last checkpoint." in early["model/README.md"]
    assert drawn == [json.loads(line) for line in after["metrics.jsonl"].splitlines()]
    for name in ("model/model.safetensors", "metrics.jsonl", *(
            name for name in after if name.startswith("checkpoints/"))):
        assert early[name] == after[name], name
    for name in ("tokenizer/tokenizer.json", "model/model.safetensors", "losses.png"):
        assert name in before and name in after
    assert after["model/model.safetensors"] == before["model/model.safetensors"]
    model = hub.load(f"{run}/model")
    assert model.config.vocab_size == len(load_tokenizer(f"{run}/model", model.config.vocab_size))
