"""States that are kept are the live teacher's, of the row and masking that they stand for."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_sharding import mesh_of

from distilbert_jax.benchmark import latency
from distilbert_jax.config import AblationConfig, DistilConfig, Masking
from distilbert_jax.data.kept_states import KeptStates, TaughtBatches
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.jobs import distil, teacher_states
from distilbert_jax.jobs.kept_parts import KeptParts
from distilbert_jax.jobs.setup import check_job, read_data, student_shape
from distilbert_jax.jobs.teacher_states import TeacherStates
from distilbert_jax.machine.sharding import by_rows
from distilbert_jax.models import hub
from distilbert_jax.models.student import student_params
from distilbert_jax.training import train as loop
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.metrics_log import read_metrics

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
PART = 16  # numbers in a file, in float64: a tenth of an epoch of the toy


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(teacher_states, "PART_BYTES", PART * 16 * 16 * 8)


@pytest.fixture
def settings(toy, tmp_path):
    """Function (settings) → a config of the toy, of one layer and with dropout."""
    def build(**more):
        return DistilConfig(**dict(
            teacher=str(toy / "teacher"), corpus=str(toy / "corpus.txt"), valid_share=0.1,
            sequence_length=16, batch_size=8, learning_rate=0.01, dropout=0.1, steps=4,
            eval_every=100, dtype="float32", mesh="8x1", output=tmp_path / "out",
            kept_maskings=2) | more)

    return build


class Pieces:
    """A run's parts before its training, and its batches once states are kept."""

    def __init__(self, config, mesh="1x1", teacher_digest=64 * "a"):
        mesh, teacher = mesh_of(mesh), hub.load(config.teacher[0])
        tokenizer = load_tokenizer(config.teacher[0], teacher.config.vocab_size)
        self.setup = read_data(config, mesh, tokenizer, {"--teacher": teacher_digest})
        family, shape = student_shape(config, teacher.family, teacher.config)
        self.assembly = assemble(config, family, shape, [teacher.config], mesh, 4)
        self.teachers = self.assembly.place(self.assembly.teachers(teacher.params))
        self.start = self.assembly.cast(student_params(teacher.params, [0], True, False))
        self.states = TeacherStates(self.setup, self.assembly, self.teachers)
        self.batches = self.states.batches(self.start)
        self._teacher = teacher.family, teacher.config

    def batch(self, step):
        """The whole batch of a step, on the host."""
        return self.batches.read(step, np.arange(self.batches.size(step)))

    def gradients(self, batch, live=False):
        """((total, means), gradients) of a batch; `live`: with the teacher, and no states."""
        teachers = self.teachers if live else self.assembly.taught(self.teachers)
        function = self._live if live else self.assembly.gradients
        if live:
            batch = {name: x for name, x in batch.items() if name != "teacher_states"}
        params = {"student": self.start, "projections": {}}
        return jax.device_get(jax.jit(function)(
            self.assembly.place(params), jax.random.key(self.setup.config.seed), teachers,
            self.setup.vocabulary, jax.device_put(batch, by_rows(self.setup.mesh))))

    @functools.cached_property
    def _live(self):
        config = dataclasses.replace(self.setup.config, kept_maskings=0)
        family, teacher = self._teacher
        return assemble(config, family, student_shape(config, family, teacher)[1], [teacher],
                        self.setup.mesh, 4).gradients


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("more", [
    {}, {"accumulate": 2, "batch_size": 16, "state_dtype": "exact"},
    {"alphas": {"ce": 5.0, "mlm": 2.0, "mse": 0.1}, "restrict_ce_to_mask": True,
     "state_dtype": "exact"}])
def test_kept_states_are_the_live_teacher_s(more, settings, x64):
    """In the second and third epoch, whose maskings are the second and, again, the first.

    An update that runs the teacher is another program, which rounds in another order: so it is
    compared in float64, and the states themselves and an update on them bit for bit.
    """
    config = settings(dtype="float64", **more)
    pieces = Pieces(config)
    rows = len(pieces.setup.data.train)
    exact = config.state_dtype == "exact"
    assert pieces.states.dtype == (np.float64 if exact else jnp.bfloat16)
    assert len(pieces.states.parts.files) > 2
    errors = pieces.states.measured()["errors"]
    assert errors.keys() == ({"ce", "mse"} if "mse" in config.alphas else {"ce", "cos"}) | {
        "gradient"}
    assert (max(errors.values()) == 0) == exact and max(errors.values()) < 0.01
    width = 2 if config.restrict_ce_to_mask else 16  # round(0.15 * 16) of 16 positions
    assert sum(np.load(path).nbytes for path in pieces.states.parts.files) == (
        pieces.states.bytes) == 2 * rows * width * 16 * (8 if exact else 2)
    for epoch in (1, 2):
        # Its first update has the end of the epoch before, if that does not end with an update.
        batch = pieces.batch(epoch * rows // config.batch_size + 1)
        assert set(batch["epoch"]) == {epoch} and set(batch["masking"]) == {epoch % 2}
        kept, live = pieces.gradients(batch), pieces.gradients(batch, live=True)
        # Computed beside other rows.
        numbers = batch["masking"] * rows + batch["row"]
        again = pieces.states._states(numbers).astype(pieces.states.dtype)
        np.testing.assert_array_equal(batch["teacher_states"], again)
        if exact:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13),
                         kept, live)
        else:
            ((_, kept), one), ((_, true), other) = kept, live
            assert kept["mlm"] == true["mlm"] and kept["ce"] != true["ce"]
            assert kept["ce"] == pytest.approx(true["ce"], rel=1e-2)
            assert kept["cos"] == pytest.approx(true["cos"], rel=1e-2)
            one, other = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
                          for tree in (one, other))
            assert 0 < np.linalg.norm(one - other) / np.linalg.norm(other) < 0.01

    # What is not this row's, or not of this masking, makes another loss; padding makes none.
    (total, _), _ = pieces.gradients(batch)
    other = pieces.batches.states.read(batch["row"], batch["epoch"] + 1)
    for wrong in (other, np.roll(batch["teacher_states"], 1, axis=0)):
        assert abs(pieces.gradients(batch | {"teacher_states": wrong})[0][0] - total) > 0.01
    if width == 16:
        padding = batch["segment_ids"] == 0
        assert padding.any()
        noisy = batch["teacher_states"].copy()
        noisy[padding] = 1e3
        assert_equal(pieces.gradients(batch | {"teacher_states": noisy}), pieces.gradients(batch))


def test_states_by_number(tmp_path):
    """As drawn at the head of the file, two to a file."""
    numbers = np.arange(6, dtype=np.float32)
    files = tuple(tmp_path / f"{i}.npy" for i in range(3))
    for i, path in enumerate(files):
        np.save(path, numbers[2 * i:2 * i + 2].reshape(2, 1, 1).view(np.uint32))
    states = KeptStates(files, 2, rows=3, maskings=2, dtype=np.dtype(np.float32))
    found = states.read(np.array([0, 2, 1, 2, 1]), np.array([0, 1, 3, 2, 4], np.int32))
    assert found.shape == (5, 1, 1) and found.ravel().tolist() == [0, 5, 4, 2, 1]


def test_meshes_agree(settings, x64, tmp_path):
    """States and gradients of one device and of eight."""
    found = []
    for mesh in ("1x1", "8x1"):
        config = settings(dtype="float64", state_dtype="exact", output=tmp_path / mesh)
        pieces = Pieces(config, mesh)
        found.append((pieces.batch(5)["teacher_states"], pieces.gradients(pieces.batch(5))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), *found)


@pytest.fixture
def float64():
    """A run in float64 switches it on for its process."""
    yield
    jax.config.update("jax_enable_x64", False)


def losses(output):
    return [{name: x for name, x in line.items() if name not in ("seconds", "waiting")}
            for line in read_metrics(output)]


def test_a_run_is_that_with_the_teacher_until_maskings_are_used_again(
        settings, tmp_path, monkeypatch, capsys, float64):
    """And stopped at any point it goes on to the same bytes."""
    monkeypatch.setattr(latency, "REPEATS", 1)
    more = {"state_dtype": "exact", "save_every": 2, "dtype": "float64"}
    kept = distil.distil(settings(**more))
    said = capsys.readouterr()
    assert "teacher states: 2 masking(s) of 152 rows in float64, 147 bytes a token, " in said.err
    line = "Teacher states of 2 masking(s) of each row, kept in float64: 147 bytes a token, "
    assert line in said.out and line in (tmp_path / "out" / "report.md").read_text()
    assert "ce 0, cos 0, gradient 0." in said.err
    found = json.loads((tmp_path / "out" / "report.json").read_text())["states"]
    assert found["bytes"] == 2 * 152 * 16 * 16 * 8 and found["seconds"] > 0
    assert found["errors"] == {"ce": 0, "cos": 0, "gradient": 0}
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    live = distil.distil(settings(**more, kept_maskings=0, output=tmp_path / "live"))
    weights = (kept / "model.safetensors").read_bytes()
    one, other = (load_file(folder / "model.safetensors") for folder in (kept, live))
    for name, tensor in other.items():
        np.testing.assert_allclose(one[name], tensor, rtol=0, atol=1e-6, err_msg=name)
    for ours, theirs in zip(losses(tmp_path / "out"), losses(tmp_path / "live"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)

    config = settings(**more, output=tmp_path / "killed")
    written, write = [], KeptParts._write

    def killed(parts, path, part):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(parts, path, part)

    class Stop(loop.StopSignal):
        def asked(self):
            return True

    folder = tmp_path / "killed" / "states"
    with pytest.MonkeyPatch.context() as patch:  # by force
        patch.setattr(KeptParts, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            distil.distil(config)
    assert len(list(folder.glob("*.npy"))) == 2
    with pytest.MonkeyPatch.context() as patch:  # by a signal, between two parts
        patch.setattr(teacher_states, "StopSignal", Stop)
        with pytest.raises(loop.Interrupted, match="stopped before state 32 of .* goes on"):
            distil.distil(config)
    with pytest.MonkeyPatch.context() as patch:  # after the first update
        patch.setattr(loop, "StopSignal", Stop)
        with pytest.raises(loop.Interrupted, match="stopped at update 1"):
            distil.distil(config)
    folder.rename(tmp_path / "away")  # where nothing is trained, no state is needed
    distil.distil(dataclasses.replace(config, finish="last"))
    assert not folder.exists()
    (tmp_path / "away").rename(folder)
    again = distil.distil(config)
    assert (again / "model.safetensors").read_bytes() == weights
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "states" / path.name).read_bytes()

    # Of a finished run nobody needs them.
    shutil.rmtree(folder)
    distil.distil(config)
    assert not folder.exists()


def test_other_states_and_damaged_ones_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(TeacherStates, "_errors", lambda *_: {})
    kept = tmp_path / "kept"
    Pieces(settings(states=kept))
    for more, said in (
            ({"valid_share": 0.2}, "corpus"), ({"mask_rate": 0.4}, "mask rate .0.15, now 0.4."),
            ({"seed": 3}, "seed .56, now 3."),
            ({"state_dtype": "exact"}, "precision .bfloat16, now float32."),
            ({"dtype": "bfloat16"}, "precision of products .float32, now bfloat16."),
            ({"kept_maskings": 1}, "number of maskings .2, now 1."),
            ({"restrict_ce_to_mask": True, "alphas": {"ce": 1.0}},
             "positions of a row .16, now 2.")):
        with pytest.raises(UserError, match=f"kept holds states for another {said}.*--states") as e:
            Pieces(settings(states=kept, output=tmp_path / "other", **more))
        assert "\n" not in str(e.value)
        shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserError, match="kept holds states for another teacher: remove it, or"):
        Pieces(settings(states=kept), teacher_digest=64 * "b")
    with monkeypatch.context() as patch:  # of another version of this program
        patch.setattr(DistilConfig, "MASKING", Masking(mask=0.7))
        with pytest.raises(UserError, match="kept holds states for another recipe of maskings"):
            Pieces(settings(states=kept))
    other = shutil.copytree(settings().teacher[0], tmp_path / "teacher")  # makes the same rows
    words = (other / "tokenizer.json").read_text()
    assert words.count('"##a"') == 1  # a piece that is in no row
    (other / "tokenizer.json").write_text(words.replace('"##a"', '"##o"'))
    with pytest.raises(UserError, match="kept holds states for another tokenizer: remove it, or"):
        Pieces(settings(states=kept, teacher=other, output=tmp_path / "words"))
    with pytest.MonkeyPatch.context() as patch:  # what does not change them computes none anew
        patch.setattr(TeacherStates, "_states", None)
        Pieces(settings(states=kept, batch_size=16, learning_rate=1e-3, output=tmp_path / "two"))

    part = kept / "00001.npy"
    whole = part.read_bytes()
    for damaged, said in ((whole[:-1] + bytes([whole[-1] ^ 1]), "its SHA-256 differs"),
                          (whole[:-8], r"00001.npy has \d+ bytes, not")):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"kept is damaged \(.*{said}.*: remove it, and"):
            Pieces(settings(states=kept))
    part.write_bytes(whole[:-8])
    (kept / "sha256.json").unlink()  # and sealed as it was found: shapes are looked at, too
    with pytest.raises(UserError, match=r"kept is damaged \(00001.npy"):
        Pieces(settings(states=kept))
    (kept / "request.json").unlink()
    with pytest.raises(UserError, match="was not made by this command, or its request.json is"):
        Pieces(settings(states=kept))

    room = type(shutil.disk_usage("/"))(9, 9, 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(UserError, match="--kept-maskings 2 needs .* GB in .*, where .* are free: "
                                        "name a folder on another disk by --states"):
        Pieces(settings(output=tmp_path / "full"))
    assert not (tmp_path / "full" / "states").exists()


@pytest.mark.parametrize("more, message", [
    ({"alphas": {"ce": 1.0, "hidden": 1.0}}, "--alpha-hidden compares states of inner layers, and "
     "--kept-maskings 2 keeps the last ones alone: give 0"),
    ({"alphas": {"relation": 1.0}}, "--alpha-relation compares states of inner layers"),
    ({"alphas": {"mlm": 1.0}}, "--kept-maskings 2 keeps states that no loss reads"),
    ({"kept_maskings": -1}, "--kept-maskings -1 must be 0 or more"),
    ({"kept_maskings": 0, "states": "x"}, "--states x is the folder for what --kept-maskings "
     "keeps: add --kept-maskings 1, or leave out --states"),
    ({"states": "gs://a/b"}, "--states gs://a/b must be a folder of this machine"),
    ({"state_dtype": "float16"}, "unknown --state-dtype 'float16'")])
def test_what_cannot_be_kept(more, message, settings, toy):
    teacher = hub.load(str(toy / "teacher"))
    with pytest.raises(UserError, match=message):
        check_job(settings(**more), teacher.family, [teacher.config])


def test_an_ablation_names_its_states_itself():
    with pytest.raises(UserError, match="--states x holds the states of one seed: leave it out"):
        AblationConfig(states="x", kept_maskings=1)


def test_a_batch_without_states_has_no_teacher(settings, monkeypatch):
    """Its embeddings and head alone are not taken for one."""
    monkeypatch.setattr(TeacherStates, "_errors", lambda *_: {})
    pieces = Pieces(settings(kept_maskings=1))
    assert isinstance(pieces.batches, TaughtBatches)
    assert "layers" not in pieces.assembly.taught(pieces.teachers)["teacher"]
    batch = {name: x for name, x in pieces.batch(0).items() if name != "teacher_states"}
    with pytest.raises(ValueError, match="has no layers, and the batch no teacher_states"):
        pieces.gradients(batch)
