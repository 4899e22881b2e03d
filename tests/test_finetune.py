"""Training for a task from end to end: three models, what they leave, stopped and started again."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_provenance import next_commands

from distilbert_jax.config import CompareConfig, DistilConfig
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import intervals
from distilbert_jax.export.exportable import Exportable, reference
from distilbert_jax.jobs import finetune as job
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.compare import compare
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.evaluate import evaluate
from distilbert_jax.jobs.finetune import finetune
from distilbert_jax.jobs.task_model import order
from distilbert_jax.machine import seal
from distilbert_jax.models import hub
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig
from distilbert_jax.training import train as loop
from distilbert_jax.training.metrics_log import read_metrics

WORDS = [a + b for a in "bdfgklmn" for b in "aeu"]


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "DRAWS", 50)
        yield


def table(path, rows, columns=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def sentences(seed, count):
    """Texts of one vowel, which is their label."""
    random = np.random.default_rng(seed)
    vowels = random.choice(["a", "e", "u"], count)
    texts = [" ".join(random.choice([w for w in WORDS if w[1] == vowel], random.integers(2, 7)))
             for vowel in vowels]
    return [(text, {"a": "open", "e": "mid", "u": "close"}[text[1]]) for text in texts]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    table(folder / "train.csv", sentences(0, 160))
    table(folder / "dev.csv", sentences(1, 40))
    (folder / "test.jsonl").write_text("".join(
        json.dumps({"text": text}) + "\n" for text, _ in sentences(2, 10)))
    return folder


def settings(toy, data, output, **more):
    return FinetuneConfig(**{
        "model": toy / "teacher", "train": data / "train.csv", "dev": data / "dev.csv",
        "output": output, "steps": 60, "batch_size": 16, "learning_rate": 0.01, "mesh": "8x1",
        "dropout": 0.0, "dtype": "float32", "eval_every": 30, "save_every": 30} | more)


@pytest.fixture(scope="module")
def distilled(toy, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetune") / "out"
    config = settings(toy, data, output, distil=True, test=data / "test.jsonl", seeds=2)
    return config, finetune(config)


def test_what_is_left(distilled, tmp_path):
    config, folder = distilled
    output = folder.parent
    assert {path.name for path in output.iterdir()} == {
        "model", "answers", "layers.json", "seed-56", "seed-57", "metrics.json", "predictions.tsv",
        "test_predictions.tsv", "submission.tsv", "report.md", "report.html", "confusion.png",
        "calibration.png", "losses.png", "calls.jsonl"}
    assert {path.name for path in (output / "seed-56").iterdir()} == {
        "teacher", "plain", "distilled"}
    left = {path.name for path in (output / "seed-57" / "plain").iterdir()}
    assert left == {"model", "finished.json", "metrics.jsonl", "tensorboard"}
    report = (output / "report.md").read_text()
    for row in ("teacher", "student, fine-tuned plainly", "student, distilled"):
        assert f"\n| {row} " in report
    assert "![losses](losses.png)" in report
    assert "![confusion](confusion.png)" in report and "Distilled over plain: " in report
    found = json.loads((output / "metrics.json").read_text())
    assert found["labels"] == ["close", "mid", "open"]
    dev = found["parts"]["dev"]
    assert dev["teacher"]["collapsed"] == 0
    assert len(dev["distilled"]["seeds"]) == 2 and len(dev["teacher"]["seeds"]) == 1
    low, high = dev["distilled"]["interval"]
    assert 0 <= low <= dev["distilled"]["score"] <= high <= 1
    assert dev["distilled"]["retention"] == pytest.approx(
        dev["distilled"]["score"] / dev["teacher"]["score"])
    card = (folder / "README.md").read_text()  # with the figures of all seeds
    assert "- kept of the teacher's score: " in card and "type: accuracy" in card
    row = compare([str(output)], str(tmp_path)).splitlines()[3]  # of the distilled one
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4] == f"{100 * dev['distilled']['score']:.2f}" and cells[6] == "2 → 1"
    student = hub.load_task(str(folder))
    assert student.config.num_hidden_layers == 1 and student.labels == ("close", "mid", "open")


def test_it_learns(distilled):
    lines = read_metrics(distilled[1].parent / "seed-56" / "teacher")
    dev = [line for line in lines if "accuracy" in line]
    assert dev[-1]["accuracy"] > 0.8 > dev[0]["accuracy"] and dev[-1]["loss"] < dev[0]["loss"]


def test_pipeline_gives_the_same_answers(distilled, data):
    pytest.importorskip("torch", reason="PyTorch is the reference here")
    import transformers

    _, folder = distilled
    classify = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    with (folder.parent / "predictions.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with (data / "dev.csv").open() as file:
        dev = list(csv.DictReader(file))
    assert len(rows) == len(dev) == 40
    for row, example in zip(rows, dev, strict=True):
        theirs = {one["label"]: one["score"] for one in classify([example["text"]])[0]}
        assert row["answer"] == max(theirs, key=theirs.get) and row["label"] == example["label"]
        assert all(float(row[name]) == pytest.approx(theirs[name], abs=2e-5) for name in theirs)


def test_evaluate_gives_the_same_figures(distilled, data, tmp_path, capsys):
    _, folder = distilled
    found = evaluate(EvaluateConfig(
        model=folder, dev=data / "dev.csv", output=tmp_path / "judged", dtype="float32"))
    dev = json.loads((folder.parent / "metrics.json").read_text())["parts"]["dev"]["distilled"]
    assert found == pytest.approx(dev["seeds"][0])
    assert "accuracy: " in capsys.readouterr().out
    assert (tmp_path / "judged" / "predictions.tsv").read_text() == (
        folder.parent / "predictions.tsv").read_text()


def test_a_masked_language_model_is_judged_as_at_the_end_of_its_run(toy, tmp_path, capsys):
    """evaluate.py gives the figures of the run's report; of --valid alone, all texts count."""
    corpus = tmp_path / "corpus.txt"
    random = np.random.default_rng(3)
    corpus.write_text("".join(" ".join(random.choice(WORDS, 9)) + "\n" for _ in range(200)))
    common = {"corpus": str(corpus), "sequence_length": 16, "valid_share": 0.2, "mesh": "8x1",
              "dtype": "float32"}
    student = distil(DistilConfig(
        **common, teacher=toy / "teacher", steps=2, batch_size=8, output=tmp_path / "run"))
    assert capsys.readouterr().out
    found = evaluate(EvaluateConfig(
        **common, model=student, teacher=toy / "teacher", output=tmp_path / "judged"))
    said = capsys.readouterr().out
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{found['perplexity']:.3f}" in report and f"{found['perplexity']:.3f}" in said
    assert f" {100 * found['teacher_top1']:.2f} |" in report
    left = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    assert left["metrics"] == found and left["teacher"] == "teacher"
    own = json.loads((tmp_path / "run" / "report.json").read_text())["models"]["student"]
    assert left["intervals"]["top1_interval"] == own["top1_interval"]
    prepared = evaluate(EvaluateConfig(
        model=student, corpus=str(tmp_path / "run" / "data"), sequence_length=16, mesh="8x1",
        dtype="float32"))
    assert prepared["perplexity"] == found["perplexity"] and "kl" not in prepared
    whole = evaluate(EvaluateConfig(
        model=student, valid=str(corpus), sequence_length=16, mesh="8x1", dtype="float32"))
    assert whole["masked"] > 3 * found["masked"]


def test_the_same_command_again_trains_nothing(distilled, monkeypatch, capsys):
    config, folder = distilled
    before = (folder / "model.safetensors").read_bytes()
    (folder.parent / "metrics.json").unlink()  # as if it was killed while it wrote the report
    drawn = []
    monkeypatch.setattr(job, "train", None)
    monkeypatch.setattr(task_report.report, "plot_runs", lambda *given: drawn.append(given))
    assert finetune(config) == folder and (folder / "model.safetensors").read_bytes() == before
    assert next_commands(capsys.readouterr().out) == {
        "ship": ShipConfig(model=str(folder), evaluate=config.dev),
        "compare": CompareConfig(runs=(config.output,))}
    (runs, figure, *_), = drawn
    assert figure == ("accuracy", "share of right answers, dev")
    assert runs == {task_report.NAMES[role]: read_metrics(folder.parent / "seed-56" / role)
                    for role in ("teacher", "plain", "distilled")} and all(runs.values())
    report = (folder.parent / "report.md").read_text()
    assert ", 2 times: `called from Python`" in report and " --distil --train " in report


@pytest.mark.parametrize("change, message", [
    ({"learning_rate": 0.02}, "holds another run (--learning-rate differ)"),
    ({"alphas": {"hard": 0.0, "soft": 0.9}}, "holds another run (--alpha-hard differ)"),
    ({"steps": 61}, "holds another run (--steps differ)")])
def test_another_run_is_refused(change, message, distilled):
    with pytest.raises(UserError) as error:
        finetune(dataclasses.replace(distilled[0], **change))
    assert message in str(error.value)


def test_a_teacher_s_answers_are_checked(distilled, tmp_path):
    config, folder = distilled
    shutil.copytree(folder.parent, tmp_path / "out")
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    logits = tmp_path / "out" / "answers" / "logits.npy"
    content = bytearray(logits.read_bytes())
    content[-1] ^= 1
    logits.write_bytes(content)
    with pytest.raises(UserError, match=r"answers is damaged \(logits.npy"):
        finetune(config)
    shutil.rmtree(tmp_path / "out" / "answers")
    shutil.copytree(folder.parent / "answers", tmp_path / "out" / "answers")
    request = tmp_path / "out" / "answers" / "request.json"
    request.write_text(request.read_text().replace("float32", "float64"))
    (tmp_path / "out" / "answers" / seal.SEAL).unlink()
    seal.seal(tmp_path / "out" / "answers")
    with pytest.raises(UserError, match="holds answers for another dtype"):
        finetune(config)


def test_stopped_and_continued_gives_the_same_bytes(toy, data, tmp_path, monkeypatch, capsys):
    """Also if it was finished early in between."""
    more = {"dropout": 0.1, "steps": 8, "save_every": 3, "eval_every": 100}
    straight = finetune(settings(toy, data, tmp_path / "a", **more))
    config, count = settings(toy, data, tmp_path / "b", **more), iter(range(5))

    class Stop(loop.StopSignal):
        def asked(self):
            return next(count, None) is None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopSignal", Stop)
        with pytest.raises(loop.Interrupted):
            finetune(config)
    stands = "this is update 6 of 8, its last checkpoint."
    stopped = finetune(dataclasses.replace(config, finish="last", seeds=2))
    said = capsys.readouterr()
    assert f" Of model, seed 56: The run is not at its end: {stands}" in said.out
    assert "left out, from seed 57 on: --finish last: there is no checkpoint in " in said.err
    assert stands in (stopped / "README.md").read_text()
    assert (tmp_path / "b" / "seed-56" / "model" / "checkpoints" / "6").is_dir()  # goes on from it
    early = (stopped / "model.safetensors").read_bytes()
    continued = finetune(dataclasses.replace(config, mesh="8x1"))
    whole = (straight / "model.safetensors").read_bytes()
    assert (continued / "model.safetensors").read_bytes() == whole != early
    assert stands not in (stopped / "README.md").read_text() + capsys.readouterr().out
    finetune(dataclasses.replace(config, finish="best"))
    assert "every model has had its last update, and stays as it is" in capsys.readouterr().err
    assert (continued / "model.safetensors").read_bytes() == whole
    with pytest.raises(UserError, match="--finish best: there is no checkpoint in .*seed-9/model/"):
        finetune(dataclasses.replace(config, finish="best", seed=9))


def test_numbers_and_unlabelled_texts_from_a_teacher(toy, tmp_path):
    random = np.random.default_rng(0)
    pairs = [(" ".join(random.choice(WORDS, 3)), " ".join(random.choice(WORDS, 3)))
             for _ in range(60)]
    rows = [(one, two, f"{len(set(one.split()) & set(two.split())) + 0.5}") for one, two in pairs]
    columns = ("sentence1", "sentence2", "score")
    table(tmp_path / "train.csv", rows[:40], columns)
    table(tmp_path / "dev.csv", rows[40:], columns)
    table(tmp_path / "more.csv", [row[:2] for row in rows], columns[:2])
    common = {"model": toy / "teacher", "train": tmp_path / "train.csv", "steps": 3,
              "dev": tmp_path / "dev.csv", "batch_size": 8, "mesh": "8x1", "dtype": "float32"}
    teacher = finetune(FinetuneConfig(**common, output=tmp_path / "teacher"))
    found = hub.load_task(str(teacher))
    assert found.config.task == "regress" and not found.labels
    width = found.config.hidden_size
    left = json.loads((teacher.parent / "seed-56" / "model" / "finished.json").read_text())
    assert left["settings"]["--learning-rate"] == pytest.approx(5e-5 * 768 / width)
    folder = finetune(FinetuneConfig(
        **common | {"model": ""}, teacher=teacher, unlabelled=tmp_path / "more.csv",
        baseline=False, output=tmp_path / "out", alphas={"hard": 0.1, "soft": 0.9, "hidden": 1.0}))
    answers = np.load(folder.parent / "answers" / "logits.npy")
    assert answers.shape == (100, 1)
    assert hub.load_task(str(folder)).config.num_hidden_layers == 1
    assert "spearman" in (folder.parent / "metrics.json").read_text()


def test_layers_are_chosen_by_what_the_teacher_answers(toy, distilled, data, tmp_path, capsys):
    """A layer that changes nothing goes first, though the even choice keeps it."""
    whole = hub.load_task(str(distilled[1].parent / "seed-56" / "teacher" / "model"))
    path = tmp_path / "teacher"
    shutil.copytree(whole.folder, path)
    tensors = load_file(path / "model.safetensors")
    for name in tensors:  # the first layer adds nothing to its input, and that is normalised
        if "layer.0." in name and ".output.dense" in name:
            tensors[name] = np.zeros_like(tensors[name])
        if "LayerNorm" in name and ("layer.0." in name or "embeddings" in name):
            tensors[name] = np.full_like(tensors[name], name.endswith("weight"))
    save_file(tensors, path / "model.safetensors")
    common = {"model": "", "teacher": path, "steps": 1, "baseline": False}
    finetune(settings(toy, data, tmp_path / "out", **common, student_layers=1))
    found = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [row["left"] for row in found["removals"]] == [[0, 1], [1]]
    sizes = json.loads((tmp_path / "out" / "metrics.json").read_text())["size"]
    teacher, student = (sizes[role]["parameters"] for role in ("teacher", "distilled"))
    said = capsys.readouterr().err
    assert (f"distilled, seed 56: 2 layers with {teacher:,} parameters → 1 layer with {student:,} "
            "parameters; 1 updates of 16 examples, 0.1 passes over 160; rows are " in said)
    assert f"float32 on 8 x cpu, into {tmp_path / 'out' / 'seed-56' / 'distilled'}\n" in said
    assert "update 1: dev (40 of 40 examples) loss " in said
    assert found["removals"][-1]["readable"] > found["evenly"] + 0.01
    kept = hub.load_task(str(tmp_path / "out" / "model")).params["layers"][0]
    theirs = hub.load_task(str(path)).params["layers"][1]
    assert np.allclose(kept["output_norm"]["scale"], theirs["output_norm"]["scale"], atol=0.02)
    found["request"]["layers"] = 2
    (tmp_path / "out" / "layers.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="layers.json was made for another layers: remove it"):
        finetune(settings(toy, data, tmp_path / "out", **common, student_layers=1))
    finetune(settings(toy, data, tmp_path / "even", **common, student_layers=1, choose="even"))
    assert not (tmp_path / "even" / "layers.json").exists()


def test_words_of_the_model_s_own_head(toy, data, tmp_path):
    config = settings(toy, data, tmp_path / "out", distil=True, augment=2, steps=None, epochs=0.5)
    folder = finetune(config)
    left = folder.parent
    logits, drawn = (np.load(left / "answers" / f"{name}.npy") for name in ("logits", "variants"))
    assert logits.shape == (3 * 160, 3)
    run = reference(Exportable.of(hub.load_task(str(left / "seed-56" / "teacher" / "model"))))
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    size = len(tokenizer(sentences(0, 160)[0][0])["input_ids"])
    for copy in range(2):  # the answer to the first text's variant stands at its place
        ids = drawn[copy, :size][None].astype(np.int64)
        np.testing.assert_allclose(
            run(ids, np.ones_like(ids), np.zeros_like(ids))[0], logits[160 * (copy + 1)], atol=1e-4)
    assert abs(logits[160] - logits[320]).max() > 1e-3
    for role, updates in (("teacher", 5), ("plain", 15), ("distilled", 15)):
        lines = read_metrics(left / "seed-56" / role)
        assert lines[-1]["step"] == updates, role  # as many for plain as for distilled


def test_variants_without_a_masked_language_head(toy, data, tmp_path):
    teacher = finetune(settings(toy, data, tmp_path / "teacher", steps=1))
    config = settings(toy, data, tmp_path / "out", model="", teacher=teacher, augment=1, steps=1,
                      baseline=False)
    finetune(config)
    drawn = np.load(tmp_path / "out" / "answers" / "variants.npy")
    request = json.loads((tmp_path / "out" / "answers" / "request.json").read_text())
    assert len(drawn) == 1 and request["augment"] == [1, config.seed, "the training texts"]
    assert np.load(tmp_path / "out" / "answers" / "logits.npy").shape == (2 * 160, 3)


def test_tags(toy, tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 40), ("dev", 12)):
        lines = []
        for _ in range(count):
            words = random.choice(WORDS, 4)
            lines += [f"{word}\t{'B-A' if word[1] == 'a' else 'O'}" for word in words] + [""]
        (tmp_path / f"{name}.conll").write_text("\n".join(lines))
    folder = finetune(FinetuneConfig(
        model=toy / "teacher", train=tmp_path / "train.conll", dev=tmp_path / "dev.conll", steps=80,
        batch_size=8, mesh="8x1", learning_rate=0.01, dropout=0.0, dtype="float32",
        output=tmp_path / "out"))
    found = json.loads((folder.parent / "metrics.json").read_text())["parts"]["dev"]["model"]
    assert found["seeds"][0]["entity_f1"] > 0.9
    lines = (folder.parent / "predictions.tsv").read_text().splitlines()
    assert sum(not line for line in lines) == 12 and len(lines) == 60
    assert hub.load_task(str(folder)).labels == ("O", "B-A")


@pytest.mark.parametrize("theirs, ours, expected", [
    (("b", "A"), ("a", "b"), [1, 0]), ((), (), [0]),
    (("LABEL_0", "LABEL_1"), ("no", "yes"), [0, 1])])
def test_labels_are_matched_by_name(theirs, ours, expected):
    assert order(theirs, ours) == expected


def test_a_teacher_with_another_order_gives_the_same_answers(distilled, data, tmp_path):
    """The labels of its config.json count, not their numbers."""
    _, folder = distilled
    shutil.copytree(folder, tmp_path / "turned")
    path = tmp_path / "turned" / "model.safetensors"
    tensors = load_file(path)
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, path)
    config = json.loads((tmp_path / "turned" / "config.json").read_text())
    config["id2label"] = {"0": "open", "1": "mid", "2": "close"}
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    ours, theirs = (evaluate(EvaluateConfig(model=name, dev=data / "dev.csv", dtype="float32"))
                    for name in (folder, tmp_path / "turned"))
    assert ours == theirs and ours["accuracy"] > 0.4
    config["id2label"] = {"0": "close", "1": "mid", "2": "open"}  # wrong for these tensors
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    wrong = evaluate(EvaluateConfig(model=tmp_path / "turned", dev=data / "dev.csv",
                                    dtype="float32"))
    assert wrong["accuracy"] < ours["accuracy"]


def test_a_model_trained_for_the_task_keeps_its_head(toy, data, distilled, tmp_path):
    """A new head would begin at random."""
    _, folder = distilled
    again = finetune(settings(toy, data, tmp_path / "out", model=folder, steps=1,
                              learning_rate=1e-9))
    before, after = (hub.load_task(str(name)).params["task_head"] for name in (folder, again))
    for part in before:
        np.testing.assert_allclose(after[part]["kernel"], before[part]["kernel"], atol=1e-6)
