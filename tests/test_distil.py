"""The two jobs from end to end on a toy language: what they leave behind, and that they learn."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_provenance import next_commands
from test_sharding import mesh_of

from distilbert_jax.benchmark import latency
from distilbert_jax.config import CompareConfig, DistilConfig, PrepareConfig, PretrainConfig
from distilbert_jax.data.prepare import prepare
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import held_out, report
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs import distil, setup
from distilbert_jax.jobs.pretrain import pretrain
from distilbert_jax.jobs.setup import check_job, read_data
from distilbert_jax.models import hub
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.training import assemble
from distilbert_jax.training import train as loop
from distilbert_jax.training.losses import LOSSES
from distilbert_jax.training.metrics_log import read_metrics

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


@pytest.fixture(scope="module", autouse=True)
def in_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "BATCH_TOKENS", 256)
        patch.setattr(latency, "REPEATS", 1)
        yield


def common(toy, output):
    return dict(corpus=(str(toy / "corpus.txt"),), valid_share=0.1, sequence_length=16,
                batch_size=16, output=str(output), dropout=0.0)


@pytest.fixture(scope="module")
def learnt(toy, tmp_path_factory):
    """A teacher that was trained from scratch, tokenizer included: its config and its folder."""
    config = PretrainConfig(
        **common(toy, tmp_path_factory.mktemp("learnt")), steps=90, eval_every=45,
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        learning_rate=1e-2)
    return config, pretrain(config)


@pytest.fixture(scope="module")
def distilled(toy, learnt, tmp_path_factory):
    """One layer of that teacher, distilled: its config and its folder."""
    config = DistilConfig(
        **common(toy, tmp_path_factory.mktemp("distilled")), teacher=str(learnt[1]), steps=40,
        eval_every=20, learning_rate=1e-2, init="random")
    return config, distil.distil(config)


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_teacher_from_scratch_learns(learnt):
    config, folder = learnt
    assert files(folder.parent) == {"checkpoints", "data", "losses.png", "metrics.jsonl", "model",
                                    "tensorboard", "tokenizer"}
    lines = read_metrics(folder.parent)
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    top1 = [line["top1"] for line in lines if "top1" in line]
    assert top1[0] < 0.2 and top1[-1] > 0.5
    model = hub.load(str(folder))
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    assert "\n# 2-layer BertForMaskedLM\n" in (folder / "README.md").read_text()


def test_a_tokenizer_that_was_learnt_otherwise_is_not_taken(toy, learnt, tmp_path, monkeypatch):
    """Also before there is a checkpoint that would say so."""
    for part in ("data", "tokenizer"):
        shutil.copytree(learnt[1].parent / part, tmp_path / "out" / part)
    config = dataclasses.replace(learnt[0], output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="with another tokenizer"):
        pretrain(dataclasses.replace(config, lowercase=not config.lowercase))

    class Read(Exception):
        pass

    def read(config, mesh, tokenizer, settings):
        assert tokenizer.get_vocab() == load_tokenizer(str(tmp_path / "out/tokenizer"), None
                                                       ).get_vocab()
        raise Read

    job = sys.modules[pretrain.__module__]
    monkeypatch.setattr(job, "train_wordpiece", None)
    monkeypatch.setattr(job, "read_data", read)
    with pytest.raises(Read):
        pretrain(config)


def test_a_distillation_leaves_its_student_and_its_figures(distilled, learnt):
    config, folder = distilled
    output = folder.parent
    assert files(output) == {"calls.jsonl", "checkpoints", "data", "losses.png", "metrics.jsonl",
                             "report.json", "report.html", "report.md", "student", "tensorboard"}
    student, teacher = hub.load(str(folder)), hub.load(str(learnt[1]))
    assert student.family.model_type == "distilbert" and student.config.num_hidden_layers == 1
    report = (output / "report.md").read_text()
    for row in ("teacher", "student", "student at start"):
        assert f"\n| {row} " in report
    models = json.loads((output / "report.json").read_text())["models"]
    for name, model in models.items():
        low, high = model["top1_interval"]
        assert 0 <= low <= model["top1"] <= high <= 1
        assert f" {100 * low:.2f} to {100 * high:.2f} |" in report
        assert ("retention_interval" in model) == (name != "teacher")
    low, high = models["student"]["retention_interval"]
    assert low <= models["student"]["retention"] <= high
    ends = f"{100 * low:.2f} to {100 * high:.2f})"
    assert f" ({ends} |" in report and f"(95 % interval {ends}; KL " in (
        folder / "README.md").read_text()
    assert "![losses](losses.png)" in report and "hidden: " in report
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "- corpus: corpus.txt\n" in card
    assert "name: top-1 of hidden tokens" in card
    assert str(Path(config.teacher[0]).parent) not in card  # no path of this machine
    assert not np.array_equal(student.params["embeddings"]["word"]["embedding"],
                              teacher.params["embeddings"]["word"]["embedding"])


def test_a_distillation_learns(distilled):
    """On documents that it was not trained on, against its start."""
    _, folder = distilled
    lines = read_metrics(folder.parent)
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses[-1] < losses[0]
    held = [line for line in lines if "top1" in line]
    assert held[-1]["top1"] > held[0]["top1"] and held[-1]["kl"] < held[0]["kl"]
    table = [line.split("|") for line in (folder.parent / "report.md").read_text().splitlines()
             if line.startswith("| student")]
    trained, start = (float(row[5]) for row in table)
    assert trained > start


def test_the_same_command_again_finishes_without_training(distilled, monkeypatch, capsys):
    config, folder = distilled
    tensors = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    lines = read_metrics(folder.parent)

    def no_step(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(assemble, "make_train_step", lambda *_: no_step)
    assert distil.distil(config) == folder
    assert (folder / "model.safetensors").read_bytes() == tensors
    assert read_metrics(folder.parent) == lines
    said = capsys.readouterr().out
    assert "report: " in said
    assert next_commands(said) == {"ship": ShipConfig(model=str(folder)),
                                   "compare": CompareConfig(runs=(config.output,))}


def kept(output):
    """All that a continuation reads."""
    return {path: path.read_bytes() for path in [*(output / "checkpoints").rglob("*"),
                                                 output / "metrics.jsonl"] if path.is_file()}


def test_a_stopped_run_is_exported_where_it_stands(toy, tmp_path, monkeypatch):
    """From the last checkpoint or the best, with nothing trained; then it goes on to its end."""
    config = DistilConfig(**common(toy, tmp_path / "out"), teacher=str(toy / "teacher"), steps=8,
                          save_every=2, keep=1, learning_rate=1e-2)
    output, tensors = tmp_path / "out", tmp_path / "out" / "student" / "model.safetensors"
    with pytest.raises(UserError, match="--finish last: there is no checkpoint in .*; leave"):
        distil.distil(dataclasses.replace(config, finish="last"))
    assert not output.exists()
    rising, held = itertools.count(), setup.held_out  # so that the first checkpoint is the best

    def judged(*args, **more):
        return held(*args, **more) | {"mlm_loss": float(next(rising))}

    def go_on(until):
        asked = iter(range(until))
        with monkeypatch.context() as patch:
            patch.setattr(setup, "held_out", judged)
            patch.setattr(loop.StopSignal, "asked", lambda self: next(asked, None) is None)
            with pytest.raises(loop.Interrupted), report.called(f"until {until}"):
                distil.distil(config)

    def finish(which, update, **more):
        before, plot, drawn = kept(output), report.plot, []

        def noted(metrics, *args):
            drawn.extend(metrics)
            plot(metrics, *args)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Assembly, "jitted", None)  # nothing is trained
            patch.setattr(report, "plot", noted)
            with report.called(f"finish {which}"):
                distil.distil(dataclasses.replace(config, finish=which, **more))
        assert kept(output) == before
        assert drawn == [line for line in read_metrics(output) if line["step"] <= update]
        found = json.loads((output / "report.json").read_text())
        steps = more.get("steps", config.steps)
        assert (found["updates"], found["updates_of_run"]) == (update, steps)
        words = {"last": "last checkpoint", "best": "checkpoint with the lowest held-out loss"}
        for name in ("report.md", "student/README.md"):
            assert (f"this is update {update} of {steps}, its {words[which]}."
                    in (output / name).read_text())
        assert (f"Trained {update} updates on {found['tokens']:,} tokens"
                in (output / "report.md").read_text())
        return tensors.read_bytes(), found["tokens"]

    go_on(1)
    first = finish("last", 2)
    assert first[1] == read_metrics(output)[-1]["tokens_seen"]
    go_on(2)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"2", "5"}
    second = finish("last", 5)
    assert finish("best", 2) == first and first[0] != second[0] and first[1] < second[1]

    distil.distil(config)
    text = (output / "report.md").read_text()
    assert "not at its end" not in text
    calls = ["until 1", "finish last", "until 2", "finish last", "finish best",
             "called from Python"]
    assert re.findall(r"^- [\d-]+: `(.*)`$", text, re.M) == calls
    assert " --steps 8 --batch-size 16 --learning-rate 0.01 --dropout 0.0 --output " in text
    straight = dataclasses.replace(config, output=str(tmp_path / "straight"))
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    whole = distil.distil(straight)
    assert tensors.read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [line["step"] for line in read_metrics(output)] == [
        line["step"] for line in read_metrics(straight.output)]
    monkeypatch.undo()
    assert finish("last", 8, steps=20)[0] == tensors.read_bytes()  # --steps makes no other run


def test_a_corpus_prepared_before_gives_the_same_student(distilled, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    config, folder = distilled
    ready = tmp_path / "ready"
    prepare(PrepareConfig(corpus=config.corpus, valid_share=config.valid_share,
                          sequence_length=config.sequence_length, tokenizer=config.teacher[0]),
            load_tokenizer(config.teacher[0], None), ready)
    again = distil.distil(dataclasses.replace(
        config, corpus=(str(ready),), output=str(tmp_path / "again")))
    assert (again / "model.safetensors").read_bytes() == (
        folder / "model.safetensors").read_bytes()
    assert files(again.parent) == {"calls.jsonl", "checkpoints", "metrics.jsonl", "student",
                                   "tensorboard"}


def test_more_steps_on_another_mesh_are_the_same_run(distilled, learnt):
    """Of the settings, only those that have no meaning may change."""
    config, _ = distilled
    shape = hub.load(str(learnt[1])).config
    changed = dict(vars(config), mesh="4x2", steps=50, save_every=5, eval_every=7, recipe="x")
    check_job(DistilConfig(**changed), FAMILIES["bert"], [shape])
    with pytest.raises(UserError, match="another run .--seed was 56, is 3; --temperature was 2.0"):
        check_job(DistilConfig(**changed | {"seed": 3, "temperature": 3.0}), FAMILIES["bert"],
                  [shape])


def test_the_rate_of_masks_in_training_is_no_matter_of_the_figures(distilled, toy, tmp_path,
                                                                   monkeypatch):
    """Nor of the prepared data, which are taken as they are; but of the run."""
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    config, folder = distilled
    again = dataclasses.replace(config, mask_rate=0.6, steps=1, output=str(tmp_path / "out"))
    shutil.copytree(folder.parent / "data", tmp_path / "out" / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    distil.distil(again)
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    own, first = ([m for m in read_metrics(output) if "top1" in m][0]
                  for output in (tmp_path / "out", folder.parent))
    figures = ("top1", "mlm_loss", "kl", "masked", "teacher_top1", "cosine")
    assert [own[name] for name in figures] == [first[name] for name in figures]
    with pytest.raises(UserError, match="another run .--mask-rate was 0.15, is 0.6"):
        distil.distil(dataclasses.replace(again, output=config.output))


def positions(params):
    return params["embeddings"]["position"]["embedding"]


CHOICES = {
    "not folded": dict(student_layers="1,", freeze_position_embeddings=True,
                       fold_token_type=False, accumulate=2, restrict_ce_to_mask=True,
                       alphas={"ce": 5.0, "mlm": 2.0}),
    "folded": dict(student_layers="2", freeze_position_embeddings=True,
                   alphas={"ce": 5.0, "cos": 1.0}),
    "random": dict(init="random", dtype="bfloat16", restrict_ce_to_mask=True, mesh="4x2",
                   alphas={"mse": 0.1, "mlm": 2.0, "cos": 1.0}, dropout=0.1),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choices(choice, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)  # seen above, and slow
    given = CHOICES[choice]
    config = DistilConfig(**common(toy, tmp_path / "out") | {
        "teacher": str(toy / "teacher"), "steps": 2} | given)
    student = hub.load(str(distil.distil(config)))
    teacher = hub.load(config.teacher[0]).params

    last = [m for m in read_metrics(tmp_path / "out") if "train_loss" in m][-1]
    assert {name for name in LOSSES if f"train_{name}" in last} == set(config.alphas)
    assert last["train_loss"] == pytest.approx(
        sum(w * last[f"train_{name}"] for name, w in config.alphas.items()), rel=1e-4)

    assert student.config.num_hidden_layers == (2 if config.student_layers == "2" else 1)
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32
               for leaf in jax.tree.leaves(student.params))
    type_0 = teacher["embeddings"]["token_type"]["embedding"][0]
    start = positions(teacher) + (type_0 if config.fold_token_type else 0)
    assert np.array_equal(positions(student.params), start) == config.freeze_position_embeddings
    near = np.abs(positions(student.params) - start).max() < 0.01
    assert near == (config.init == "teacher")
    if config.init == "random":  # plain, not the start for pretraining, which leaves columns empty
        assert np.abs(positions(student.params)[:, -1]).mean() > 5e-3


@pytest.mark.parametrize("headless", [False, True])
def test_adapting_a_model(headless, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *_: None)
    model = toy / "teacher"
    if headless:
        model = tmp_path / "headless"
        write_without(toy / "teacher", model, "cls.")
        assert not hub.load(str(model)).config.mlm_head
    config = PretrainConfig(
        **common(toy, tmp_path / "out"), model=str(model), steps=1, learning_rate=1e-4)
    folder = pretrain(config)
    before, after = hub.load(str(toy / "teacher")), hub.load(str(folder))
    assert after.config.num_hidden_layers == before.config.num_hidden_layers == 2
    assert "tokenizer" not in files(folder.parent)

    def moved(part):
        return max(np.abs(a - b).max() for a, b in zip(
            *(jax.tree.leaves(m.params[part]) for m in (before, after)), strict=True))

    assert 0 < moved("layers") < 1e-3
    assert (moved("mlm_head") < 1e-3) != headless

    before = kept(folder.parent)
    assert "not at its end" not in (folder / "README.md").read_text()
    pretrain(dataclasses.replace(config, steps=5, finish="best"))
    assert "this is update 1 of 5, its checkpoint with" in (folder / "README.md").read_text()
    assert kept(folder.parent) == before
    for one, other in zip(*(jax.tree.leaves(m.params) for m in (
            after, hub.load(str(folder)))), strict=True):
        np.testing.assert_array_equal(one, other)


def byte_level(texts):
    """A byte-level BPE tokenizer with RoBERTa's special tokens and ids, learnt from these texts."""
    import tokenizers
    import transformers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = tokenizers.decoders.ByteLevel()
    learnt.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=90, special_tokens=special, show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learnt, bos_token="<s>", cls_token="<s>", sep_token="</s>",
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_every_family_is_a_teacher(name, toy, tiny_model, tmp_path, monkeypatch):
    """Its student is of the same family, and transformers finds all of it and the same logits."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference here")
    import transformers

    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    family = FAMILIES[name]
    tokenizer = load_tokenizer(str(toy / "teacher"), None) if name == "distilbert" else (
        byte_level((toy / "corpus.txt").read_text().splitlines()))
    shape = dict(num_hidden_layers=2, vocab_size=len(tokenizer), layer_norm_eps=1e-5,
                 pad_token_id=tokenizer.pad_token_id)
    config, params = tiny_model(**shape | dict(family.fixed))
    export(tmp_path / "teacher", params, config, family, tokenizer, "A toy.\n")
    folder = distil.distil(DistilConfig(**common(toy, tmp_path / "out") | {
        "teacher": str(tmp_path / "teacher"), "steps": 2, "sequence_length": 16}))

    student = hub.load(str(folder))
    assert (student.family, student.config) == (
        family, dataclasses.replace(config, num_hidden_layers=1, hidden_dropout=0.0,
                                    attention_dropout=0.0))
    model, info = getattr(transformers, family.architecture).from_pretrained(
        folder, output_loading_info=True)
    assert not any(info.values()), info
    read = transformers.AutoTokenizer.from_pretrained(folder)
    ids = np.array([[read.cls_token_id, *read("ba be bu")["input_ids"][:8], read.sep_token_id]])
    ours = nnx.merge(graphdef(student.config, "float32"), jax.tree.map(
        jnp.asarray, student.params))
    logits = ours.mlm_logits(ours(jnp.asarray(ids), jnp.ones_like(ids), jnp.arange(
        ids.shape[1])[None]).last)
    with torch.no_grad():
        np.testing.assert_allclose(
            logits, model.eval()(torch.tensor(ids)).logits, rtol=0, atol=2e-5)


def test_a_narrower_student_of_its_own(toy, tiny_model, tmp_path, monkeypatch, capsys):
    """Hidden states meet through projections, which are trained, kept, and not exported."""
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    family = FAMILIES["distilbert"]
    shape = dict(vocab_size=len(tokenizer), hidden_size=8) | dict(family.fixed)
    config, params = tiny_model(**shape)
    small = tmp_path / "small"
    export(small, params, config, family, tokenizer, "A toy.\n")
    given = DistilConfig(**common(toy, tmp_path / "out") | {
        "teacher": str(toy / "teacher"), "student": str(small), "steps": 2, "save_every": 1,
        "alphas": {"ce": 5.0, "mlm": 2.0, "hidden": 1.0}})
    folder = distil.distil(given)
    student = hub.load(str(folder))
    assert student.config.hidden_size == 8
    assert jax.tree.map(np.shape, student.params) == jax.tree.map(np.shape, params)
    moved = max(np.abs(a - b).max() for a, b in zip(*map(
        jax.tree.leaves, (student.params, params)), strict=True))
    assert 0 < moved < 0.01
    last = [m for m in read_metrics(tmp_path / "out") if "retention" in m][-1]
    assert "cosine" not in last and "train_hidden" in [
        m for m in read_metrics(tmp_path / "out") if "train_loss" in m][-1]
    assert "cosine" not in (folder.parent / "report.md").read_text()
    assert "started as `small`" in (folder / "README.md").read_text()

    # Killed after the first update it ends with the same bytes: the projections were kept too.
    expected = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "2")
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    distil.distil(given)
    assert (folder / "model.safetensors").read_bytes() == expected

    other = dataclasses.replace(given, output=str(tmp_path / "other"))
    with pytest.raises(UserError, match="--alpha-cos compares states of equal width"):
        distil.distil(dataclasses.replace(other, alphas={"cos": 1.0}))
    config, params = tiny_model(**shape | {"vocab_size": 50})
    export(small, params, config, family, tokenizer, "A toy.\n")
    with pytest.raises(UserError, match=f"knows 50 tokens, the teacher {len(tokenizer)}: both"):
        distil.distil(other)


def test_a_report_survives_held_out_documents_of_unknown_tokens(toy, tmp_path, capsys):
    """The first ones have nothing to hide; the teacher has spare rows beside its tokens."""
    lines = (toy / "corpus.txt").read_text().splitlines()
    (tmp_path / "v.txt").write_text("\n".join(["☃ ☃ ☃ ☃"] * 9 + lines[:20]))
    teacher = hub.load(str(toy / "teacher"))
    words = teacher.params["embeddings"]["word"]["embedding"]
    spare = np.full((7, words.shape[1]), 0.1, np.float32)
    params = teacher.params | {
        "embeddings": teacher.params["embeddings"] | {
            "word": {"embedding": np.concatenate([words, spare])}},
        "mlm_head": teacher.params["mlm_head"] | {
            "bias": np.pad(teacher.params["mlm_head"]["bias"], (0, 7))}}
    config = dataclasses.replace(teacher.config, vocab_size=len(words) + 7)
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    export(tmp_path / "teacher", params, config, teacher.family, tokenizer, "A toy.\n")
    folder = distil.distil(DistilConfig(**common(toy, tmp_path / "out") | {
        "teacher": str(tmp_path / "teacher"), "valid": (str(tmp_path / "v.txt"),), "steps": 1}))
    assert "hidden: " in (folder.parent / "report.md").read_text()
    assert hub.load(str(folder)).config.vocab_size == len(words) + 7
    assert "tokens are unknown to the tokenizer, e.g. of '☃" in capsys.readouterr().out


def test_the_vocabulary_of_the_step_is_the_tokenizer_s(toy, tmp_path):
    config = DistilConfig(**common(toy, tmp_path / "out"), teacher=str(toy / "teacher"))
    tokenizer = load_tokenizer(config.teacher[0], None)
    words = read_data(config, mesh_of("1x1"), tokenizer, {}).vocabulary
    assert words.mask_id == tokenizer.mask_token_id
    special = np.flatnonzero(np.asarray(words.counts) == 0)
    assert special.tolist() == sorted(tokenizer.all_special_ids)
    assert not np.isin(words.ordinary_ids, special).any()


@pytest.mark.parametrize("name, longest", [("bert", 24), ("roberta", 22)])
def test_the_longest_row(name, longest, toy, tiny_model):
    """RoBERTa's table has two rows that no position is at."""
    family = FAMILIES[name]
    shape, _ = tiny_model(pad_token_id=1, **family.fixed)
    settings = common(toy, "nowhere") | {"sequence_length": longest}
    check_job(DistilConfig(**settings), family, [shape])
    with pytest.raises(UserError, match=f"{longest + 1} is beyond the model's {longest} positions"):
        check_job(DistilConfig(**settings | {"sequence_length": longest + 1}), family, [shape])


@pytest.fixture(scope="module")
def idle(toy, tmp_path_factory):
    """The toy's teacher, whose first layer adds nothing to its input, which is normalised."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("idle") / "teacher"
    shutil.copytree(toy / "teacher", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layer.0." in name and ".output.dense" in name:
            tensors[name] = np.zeros_like(tensors[name])
        if "LayerNorm" in name and ("layer.0." in name or "embeddings" in name):
            tensors[name] = np.full_like(tensors[name], name.endswith("weight"))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_layers_are_removed_by_what_the_teacher_predicts(toy, idle, tmp_path, monkeypatch, capsys):
    """A layer that changes nothing goes first, though the even choice keeps it."""
    seen, shortened = [], distil.Shortened

    def noted(*given):
        seen.append(given[4])
        return shortened(*given)

    monkeypatch.setattr(distil, "Shortened", noted)
    output = tmp_path / "out"
    config = DistilConfig(**common(toy, output) | {
        "teacher": str(idle), "steps": 2, "choose": "greedy", "learning_rate": 1e-4,
        "dtype": "float32"})
    distil.distil(config)
    found = json.loads((output / "layers.json").read_text())
    assert [row["left"] for row in found["removals"]] == [[0, 1], [1]]
    assert found["removals"][1]["kl"] < 1e-3 < 0.1 < found["evenly"]
    table, said = f"| 0       |           1 |     {found['removals'][1]['kl']:.3f} |", (
        capsys.readouterr())
    assert table in (output / "report.md").read_text() and table in said.out
    models = json.loads((output / "report.json").read_text())["models"]
    teacher, student = (models[name]["parameters"] for name in ("teacher", "student"))
    rows, held = (np.concatenate([np.load(path)["row"] for path in sorted(
        (output / "data").glob(f"{part}-*.npy"))]) for part in ("train", "valid"))
    assert (f"distil: 2 layers with {teacher:,} parameters → 1 layer with {student:,} parameters; "
            f"2 updates of 16 rows of 16 tokens, {2 * 16 / len(rows):.1f} passes over "
            f"{len(rows):,} rows; float32 on 8 x cpu, into {output}\n") in said.err
    last = [m for m in read_metrics(output) if "kl" in m][-1]
    assert (f"KL {last['kl']:.4f} nats ({min(128, len(held))} of {len(held)} rows)\n"
            in said.err.split("update 2: held-out top-1 ")[1])
    assert "started as the teacher's layers 1." in (output / "student" / "README.md").read_text()
    scale = hub.load(str(idle)).params["layers"][1]["output_norm"]["scale"]
    kept = hub.load(str(output / "student")).params["layers"][0]["output_norm"]["scale"]
    np.testing.assert_allclose(kept, scale, atol=1e-3)

    # of the training rows, never of the held-out ones
    train = np.concatenate([np.load(path)["row"] for path in sorted(
        (output / "data").glob("train-*.npy"))])
    assert len(seen) == 1 and np.array_equal(seen[0].rows[np.arange(len(train))], train)

    # A continuation keeps what the file says, and does not choose again; so does a run that was
    # stopped before its first checkpoint.
    found["removals"][1]["left"] = [0]
    (output / "layers.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="another run .layers of --choose was .1., is .0.."):
        distil.distil(config)
    again = dataclasses.replace(config, output=str(tmp_path / "again"), steps=1)
    (tmp_path / "again").mkdir()
    shutil.copy(output / "layers.json", again.output)
    card = distil.distil(again) / "README.md"
    assert "started as the teacher's layers 0." in card.read_text() and len(seen) == 1

    found["request"]["layers"] = 2
    (output / "layers.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="layers.json was made for another layers: remove it"):
        distil.distil(config)
    assert json.loads((output / "layers.json").read_text()) == found


def test_where_no_layer_is_removed_none_is_tried(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "_write_report", lambda *_: None)
    monkeypatch.setattr(distil, "Shortened", None)
    for name, given in (("all", dict(choose="greedy", student_layers=2)), ("even", {})):
        distil.distil(DistilConfig(**common(toy, tmp_path / name) | {
            "teacher": str(toy / "teacher"), "steps": 1} | given))
        assert not (tmp_path / name / "layers.json").exists()


def write_without(source, target, prefix):
    """Copy a folder, without the tensors of one prefix."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)},
              target / "model.safetensors")


@pytest.mark.parametrize("retention, perplexity, alphas, said", [
    (0.99, 2.1, {}, None), (1.0, 2.0, {}, None),
    (1.01, 2.1, {"mlm": 2.0}, " The student's retention is above 100 %: it was trained on this "
     "corpus, with its hidden tokens as labels (--alpha-mlm 2), while the teacher stayed"),
    (0.9, 1.9, {"ce": 1.0, "mlm": 0.0}, " The student's perplexity is below its teacher's: it was "
     "trained on this corpus, while the teacher stayed"),
    (1.2, 1.9, {"ce": 1.0}, " The student's retention is above 100 % and its perplexity is below")])
def test_a_student_that_is_ahead_is_explained(retention, perplexity, alphas, said):
    config = DistilConfig(alphas=alphas or {"mlm": 1.0})
    found = distil._ahead(config, {"retention": retention, "perplexity": perplexity,
                                   "teacher_perplexity": 2.0})
    assert found.startswith(said) if said else found == ""


def test_an_exchange_of_layers_stands_in_the_table():
    rows = [([0, 1, 2], 0.0), ([1, 2], 0.5), ([0, 2], 0.25)]
    text = distil._describe_removals({
        "removals": [{"left": left, "kl": kl} for left, kl in rows], "masked": 9, "evenly": 0.25})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:4]]
    assert cells == [["0", "1, 2", "0.500"], ["1 (0 is back)", "0, 2", "0.250"]]
