"""Shipping: what is left in the folder, what is refused, and answers from it without PyTorch."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_card import files_that_name, snippets
from test_cli import launch, tree, with_classifier, with_config, with_file, without

from distilbert_jax import predict
from distilbert_jax.commands.main import ship
from distilbert_jax.config import DistilConfig
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.export import formats, gate, onnx
from distilbert_jax.export.exportable import Exportable, reference
from distilbert_jax.jobs import ship as job
from distilbert_jax.jobs import trials
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.finetune import finetune
from distilbert_jax.models import hub
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.task_config import FinetuneConfig

pytest.importorskip("onnxruntime", reason="pip install 'distilbert_jax[serve]'")
pytest.importorskip("onnx", reason="pip install 'distilbert_jax[serve]'")

LENIENT = {"same": gate.Limit("same", least=0.1)}  # a toy's answers hang on a hair


@pytest.fixture
def lenient(monkeypatch):
    """int8 of noisy toys passes; that it is stopped otherwise is tested where the gate is."""
    for name, row in formats.FORMATS.items():
        if name != "onnx":
            monkeypatch.setitem(formats.FORMATS, name, row.__class__(
                **row.__dict__ | {"limits": LENIENT}))


@pytest.fixture
def place(toy, tmp_path, monkeypatch):
    """The working folder: teacher/ and corpus.txt."""
    shutil.copytree(toy / "teacher", tmp_path / "teacher")
    shutil.copy(toy / "corpus.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "DOCUMENTS", 40)
    return tmp_path


def shipped(**settings):
    return job.ship(ShipConfig(**{"model": "teacher", "evaluate": "corpus.txt"} | settings))


def test_a_language_model_is_shipped_and_what_was_there_stays(place, lenient, capfd):
    before = tree(place / "teacher")
    assert shipped(reduce_range=True) == Path("teacher")
    after = tree(place / "teacher")
    assert set(after) - set(before) == {
        "onnx", "onnx/model.onnx", "onnx/model_quantized.onnx", "report.html", "report.md",
        "report.json"}
    assert {name: after[name] for name in before} == before
    found = json.loads(after["report.json"])
    assert found["formats"]["onnx"]["figures"]["same"] == 1
    assert found["formats"]["int8"]["bytes"] == len(after["onnx/model_quantized.onnx"])
    assert found["trial"].startswith("40 documents of corpus.txt, ")
    page = after["report.md"].decode()
    latency = found["latency"]["milliseconds"]
    assert set(latency) == {"onnx", "int8"} and " [ms] |" in page and "avx2" in page
    assert all(0 < median <= late for times in latency.values() for median, late in times.values())
    assert "onnx/model_quantized.onnx" in page and "| ONNX, float32 " in page
    said = capfd.readouterr().err
    assert "onnx: 0.0 MB written in" in said and "shipped: teacher" in said

    shipped(formats="onnx")  # again: what this command made is replaced, the rest stays
    again = tree(place / "teacher")
    assert again["onnx/model.onnx"] == after["onnx/model.onnx"]
    assert set(json.loads(again["report.json"])["formats"]) == {"onnx", "int8"}


def test_a_page_offers_texts_and_the_answers_of_a_teacher(place, lenient):
    shipped(output="copy", demo=True, teacher="teacher")
    page = (place / "copy.html").read_text(encoding="utf-8")
    about = json.loads(page.split('id="about">')[1].split("</script>")[0])
    lines = (place / "corpus.txt").read_text(encoding="utf-8").splitlines()
    assert about["output"] == "mlm" and len(about["examples"]) == 3
    for (text,), line, answers in zip(
            about["examples"], lines, about["teacher"]["answers"], strict=False):
        begin, end = text.split("[MASK]")
        assert line.startswith(begin) and line.endswith(end) and len(text.split()) == len(
            line.split())
        assert answers == [list(pair) for pair in predict.load("teacher").fill_mask([text])[0][0]]
    with pytest.raises(UserError, match="--teacher teacher answers on the page of --demo: add it"):
        shipped(output="copy", teacher="teacher")


def test_a_copy_leaves_the_model_as_it_is(place):
    with_file("teacher/1_Pooling/config.json", b"{}")()
    before = tree(place / "teacher")
    launch.launch(ship, ["--model", str(place / "teacher"), "--evaluate", str(
        place / "corpus.txt"), f"--output={place / 'out' / 'copy'}", "--formats", "onnx"])
    assert tree(place / "teacher") == before
    after = tree(place / "out" / "copy")
    assert {name: after[name] for name in before} == before
    assert "onnx/model.onnx" in after
    assert [path.name for path in Path("out").iterdir()] == ["copy"]
    assert not files_that_name(place / "out", place)
    said = "distilbert-jax ship --model teacher --evaluate corpus.txt --output=copy --formats onnx"
    assert json.loads(after["report.json"])["command"] == said
    assert said in after["report.md"].decode() and said in after["report.html"].decode()


def test_a_copy_s_tokenizer_loads_in_transformers_4_too(place):
    path = place / "teacher/tokenizer_config.json"
    raw = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend", "backend": "x"}
    path.write_text(json.dumps(raw))
    found = json.loads((shipped(output="copy", formats="onnx") / path.name).read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in found
    assert found["mask_token"] == raw["mask_token"]
    assert json.loads(path.read_text()) == raw


def test_what_is_refused_is_deleted_and_the_rest_stays(place, monkeypatch, capfd):
    strict = {"same": gate.Limit("the share of equal answers", least=1.5)}
    row = formats.FORMATS["int8"]
    monkeypatch.setitem(formats.FORMATS, "int8", row.__class__(**row.__dict__ | {"limits": strict}))
    with pytest.raises(SystemExit) as end:
        launch.launch(ship, ["--model", "teacher", "--evaluate", "corpus.txt"])
    error = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert error.startswith("error: int8 is refused and deleted: the share of equal answers is ")
    assert "at least 1.5 is allowed (judged on 40 documents of corpus.txt, " in error
    assert [path.name for path in Path("teacher/onnx").iterdir()] == ["model.onnx"]
    assert not Path("teacher/.shipping").exists()
    found = json.loads(Path("teacher/report.json").read_text())["formats"]
    assert found["int8"]["problems"] and not found["onnx"]["problems"]
    assert "int8 was refused: the share" in Path("teacher/report.md").read_text()


def test_a_file_that_passed_before_goes_when_its_successor_is_refused(place, monkeypatch):
    shipped(formats="onnx")
    right = onnx._mask_bias
    monkeypatch.setattr(onnx, "_mask_bias", lambda graph: graph.add(
        "Mul", right(graph), graph.array("zero", 0)))
    with pytest.raises(UserError, match="onnx is refused and deleted: the largest difference"):
        shipped(formats="onnx")
    assert not Path("teacher/onnx/model.onnx").exists()


def test_a_disk_that_is_full_leaves_nothing(place, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.FORMATS["onnx"].__class__(
        **formats.FORMATS["onnx"].__dict__ | {"write": full}))
    before = tree(place)
    with pytest.raises(UserError, match="teacher cannot be written: No space left on device"):
        shipped(formats="onnx")
    assert tree(place) == before


CANNOT = [  # (what is made, words, parts of the message)
    (lambda: None, "--model=", ["--model is missing"]),
    (lambda: None, "--model nowhere/x/y", ["model folder nowhere/x/y does not exist"]),
    (lambda: None, "--formats onnx int9", ["unknown format 'int9'; did you mean int8?"]),
    (without("teacher/tokenizer.json", "teacher/tokenizer_config.json"), "",
     ["tokenizer in teacher knows 5 tokens", "tokenizer.json or vocab.txt is missing"]),
    (with_config(model_type="gpt2"), "", ["model_type 'gpt2' is not supported", "bert, "]),
    (lambda: None, "--output corpus.txt/new", ["corpus.txt/new cannot be written: Not a dir"]),
    (lambda: None, "--output teacher/new", ["--output teacher/new and --model teacher lie within"]),
    (lambda: None, "--output gs://bucket/new", ["shipped to a folder of this machine"]),
    (with_file("mine/text", b""), "--output mine", ["--output mine is there and was not made by"]),
    (with_file("teacher/onnx/model.onnx", b"x"), "", [
        "teacher/onnx/model.onnx was not made by this command and would be replaced"]),
    (with_file("teacher/report.md", b"x"), "", ["teacher/report.md was not made by this command"]),
    (lambda: None, "--evaluate absent.txt", ["corpus 'absent.txt': no such file"]),
    (with_file("a.tsv", b"text\tlabel\nba\tx\n"), "--evaluate a.tsv",
     ["--evaluate a.tsv is a table, and teacher guesses hidden words: give texts"]),
    (with_file("a.pdf", b"x"), "--evaluate a.pdf", ["a.pdf: no text; unpack or convert it"]),
    (with_file("a.txt", b"\n"), "--evaluate a.txt", ["there is no text in a.txt"]),
    (with_file("a.csv", b"text,label\nba,x\n"), "--evaluate a.csv corpus.txt",
     ["some are labelled files, some texts: give one kind"]),
    (lambda: (with_classifier()(), with_file("a.csv", b"text,label\nba,1\nbe,2\n")()),
     "--evaluate a.csv", ["labels of the model are x, y, those of the data 1, 2"]),
    (lambda: (with_classifier()(), with_file("a.csv", b"body,label\nba,x\n")()),
     "--evaluate a.csv", ["a.csv:2: name the column of the text", "by --text"]),
    (lambda: (with_file("teacher/modules.json", b"[]")(), with_file("a.csv", b"text,label\nb,1\n")(
        )), "--evaluate a.csv", ["a.csv holds no pairs of texts with a score"]),
    (lambda: None, "--task mrpc", ["--task says how the files of --evaluate are read"]),
]


@pytest.mark.parametrize("make, words, parts", CANNOT)
def test_what_cannot_be_shipped(make, words, parts, place, capfd):
    make()
    before = tree(Path())
    given = ["--formats", "onnx", *(["--evaluate", "corpus.txt"] if "--task" not in words and (
        "--evaluate" not in words) else []), *words.split()]
    with pytest.raises(SystemExit) as end:
        launch.launch(ship, [*([] if "--model" in words else ["--model", "teacher"]), *given])
    error = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: "), error
    assert all(part in error for part in parts), error
    assert tree(Path()) == before


def test_a_library_that_is_missing(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    before = tree(place)
    with pytest.raises(UserError, match=r'onnxruntime: pip install "distilbert_jax\[serve\]"'):
        shipped()
    with pytest.raises(UserError, match="format onnx needs onnxruntime"):
        distil(DistilConfig(teacher="teacher", corpus="corpus.txt", output="new", ship=True))
    assert tree(place) == before


def test_without_texts_documentation_or_made_up_rows_are_taken(place, shared):
    found = hub.load_any("teacher")
    model = Exportable.of(found)
    tokenizer = load_tokenizer("teacher", None)
    trial = trials.default(model, tokenizer)
    assert trial.text.startswith("32 made-up rows (no text was given), ")
    ids = np.array(trial.examples.ids)
    assert ids.shape == (32, 24) and (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids == tokenizer.mask_token_id).sum() == trial.examples.starts[-1]
    assert (np.concatenate(trial.examples.labels) > 4).all()  # the model filled every mask

    english = load_tokenizer(str(shared / "minilm-l6"), None)
    model = Exportable.of(hub.load_any(str(shared / "minilm-l6")))
    assert trials.default(model, english).text == "40 texts of Python's documentation"


def test_hidden_tokens_are_ordinary_ones():
    ids = [np.array([2, 7, 8, 9, 10, 11, 3], np.int32), np.array([2, 3], np.int32)]
    found = trials.hidden(trials._plain(ids), [0, 1, 2, 3, 4], 4)
    assert len(found) == 1  # the other has none
    at, label = int(found.positions[0][0]), int(found.labels[0][0])
    assert len(found.positions[0]) == 1 and ids[0][at] == label and found.ids[0][at] == 4
    assert ids[0].tolist() == [2, 7, 8, 9, 10, 11, 3]


def test_a_sentence_encoder_is_judged_by_its_pairs(place):
    with_file("teacher/modules.json", b'[{"type": "sentence_transformers.models.Transformer", '
              b'"path": ""}, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},'
              b'{"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]')()
    with_file("teacher/1_Pooling/config.json", b'{"pooling_mode_mean_tokens": true}')()
    with_file("teacher/sentence_bert_config.json", b'{"max_seq_length": 6}')()
    pairs = [(f"ba {'be ' * n}", "ba bu", float(n % 5)) for n in range(20)]
    with_file("a.tsv", ("sentence1\tsentence2\tscore\n" + "".join(
        f"{a}\t{b}\t{c}\n" for a, b, c in pairs)).encode())()
    folder = shipped(evaluate="a.tsv", formats="onnx")
    found = json.loads((folder / "report.json").read_text())
    assert found["output"] == "states" and found["trial"] == "20 pairs of a.tsv"
    assert found["formats"]["onnx"]["figures"]["cosine_worst"] > 0.9999
    # By sentence-transformers' definition, from our own states.
    tokenizer = load_tokenizer("teacher", None)
    run = reference(Exportable.of(hub.load_any("teacher")))
    texts = ["ba", "ba be bu", "ba be bu da fa fe"]
    expected = []
    for text in texts:
        ids = np.array(tokenizer(text, truncation=True, max_length=6)["input_ids"])[None]
        mean = run(ids, np.ones_like(ids), np.zeros_like(ids))[0].mean(0)
        expected.append(mean / np.linalg.norm(mean))
    for runtime in ("jax", "onnx"):
        vectors = predict.load("teacher", runtime).embed(texts)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


# As a server does it: ONNX Runtime and tokenizers, and nothing else of ours.
SERVER = '''
import json, sys
for name in ("torch", "jax", "flax", "transformers", "safetensors"):
    sys.modules[name] = None
from distilbert_jax.predict import load
kind, given = sys.argv[2], json.loads(sys.argv[3])
found = [getattr(load(sys.argv[1], runtime), kind)(given) for runtime in ("onnx", "int8")]
print(json.dumps(found))
'''


def served(kind, given):
    done = subprocess.run([sys.executable, "-c", SERVER, "teacher", kind, json.dumps(given)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fill_mask_without_pytorch_or_jax(place, lenient):
    shipped(reduce_range=True)
    texts = ["ba [MASK] ba [MASK]", "fe [MASK]"]
    ours = predict.load("teacher").fill_mask(texts, top=3)
    exact, rounded = served("fill_mask", {"": texts}[""])
    assert [len(masks) for masks in exact] == [2, 1] == [len(masks) for masks in rounded]
    for mine, theirs in zip(ours, exact, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert [word for word, _ in a] == [word for word, _ in b][:3]
            assert [p for _, p in a] == pytest.approx([p for _, p in b][:3], abs=1e-5)
    with pytest.raises(UserError, match=r"text 2 has no \[MASK\] to fill"):
        predict.load("teacher").fill_mask(["[MASK]", "ba"])
    with pytest.raises(UserError, match="text 1 has 33 tokens, the model takes 24: shorten it"):
        predict.load("teacher").fill_mask(["ba " * 30 + "[MASK]"])
    with pytest.raises(UserError, match="teacher answers fill_mask, not embed"):
        predict.load("teacher", "onnx").embed(["ba"])


def test_classes_of_texts_and_pairs_without_pytorch_or_jax(place, lenient):
    with_classifier()()
    shipped(evaluate="a.csv", reduce_range=True)
    found = json.loads(Path("teacher/report.json").read_text())
    assert found["trial"] == "42 examples of a.csv" and "score" in found["ours"]
    texts = ["ba", "ba be", ("ba", "fe fa")]
    exact, rounded = served("classify", texts[:2])
    ours = predict.load("teacher").classify(texts)
    assert list(ours[0]) == ["x", "y"] and len(rounded) == 2
    assert exact == [pytest.approx(row, abs=1e-5) for row in ours[:2]]
    pair = load_tokenizer("teacher", None)(*texts[2])
    model = Exportable.of(hub.load_any("teacher"))
    logits = reference(model)(*(np.array([pair[name]]) for name in (
        "input_ids", "attention_mask", "token_type_ids")))[0]
    shares = np.exp(logits) / np.exp(logits).sum()
    assert list(ours[2].values()) == pytest.approx(list(shares), abs=1e-6)


def test_files_that_cannot_be_answered_from(place):
    missing = "onnx/model.onnx does not exist: write it by distilbert-jax ship"
    for runtime, message in (("onnx", missing),
                             ("onxn", "unknown runtime 'onxn'; did you mean onnx?")):
        with pytest.raises(UserError, match=message):
            predict.load("teacher", runtime)
    with_file("teacher/onnx/model.onnx", b"nothing")()
    with pytest.raises(UserError, match="onnx/model.onnx cannot be loaded: "):
        predict.load("teacher", "onnx")
    Path("teacher/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        predict.load("teacher")


def test_a_distillation_ships_its_student(place, lenient, capfd):
    given = {"teacher": str(place / "teacher"), "corpus": place / "corpus.txt",
             "output": place / "new"}
    with report.called(f"distilbert_jax.distil(**{given})"):
        folder = distil(DistilConfig(
            **given, ship=True, steps=1, batch_size=8, sequence_length=16, valid_share=0.2,
            mesh="8x1"))
    found = json.loads((folder / "report.json").read_text())
    assert "documents that the run held out" in found["trial"]
    assert found["formats"]["onnx"]["figures"]["same"] == 1
    assert (folder / "onnx" / "model_quantized.onnx").exists()
    assert not files_that_name(folder, place)
    answered = run_snippet(folder, capfd)
    [(word, _), *_], = predict.load(folder, "onnx").fill_mask(["A sentence with a [MASK]."])[0]
    assert answered == f"{word}\n"


def run_snippet(folder, capfd):
    """What is printed by that part of a model's card that is for ONNX Runtime alone."""
    code = snippets((folder / "README.md").read_text())[-1]
    capfd.readouterr()
    with contextlib.chdir(folder.parent):
        exec(code, {})
    return capfd.readouterr().out


def test_a_training_for_tags_ships_its_model_and_answers(place, lenient, capfd):
    words = [("ba", "O"), ("be", "B-x"), ("bu", "I-x"), ("fa", "O")]
    sentence = "".join(f"{word} {tag}\n" for word, tag in words) + "\n"
    other = "fe O\nfa B-x\n\n"
    Path("a.conll").write_text((sentence + other) * 8)
    folder = finetune(FinetuneConfig(
        model=place / "teacher", train=place / "a.conll", dev="a.conll", output=place / "new",
        ship=True, steps=2, batch_size=8, mesh="8x1", dropout=0.0))
    assert not files_that_name(folder, place)
    found = json.loads((folder / "report.json").read_text())
    assert found["output"] == "tag" and found["trial"] == "16 examples of a"
    sentences = [["ba", "be", "bu", "fa"], ["fe"], ["fa"] * 40]
    ours = predict.load(folder).tag(sentences)
    assert predict.load(folder, "onnx").tag(sentences) == ours
    assert [len(tags) for tags in ours] == [4, 1, 40] and ours[2][-1] == "O"
    gold = Path("new/predictions.tsv").read_text().split("\n\n")[0].splitlines()
    assert ours[0] == [line.split("\t")[2] for line in gold]
    tokens, tags = run_snippet(folder, capfd).split("] [")
    assert tokens.startswith("['[CLS]', ") and len(tags.split()) == len(tokens.split(", "))
