"""The jobs from Python: what a person writes, in a thread too; and the examples."""

import base64
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_page import BROWSER, seen

import distilbert_jax as dj
from distilbert_jax.commands.distil import settings
from distilbert_jax.jobs.sentence_model import Named
from distilbert_jax.recipes import recipes

EXAMPLES = Path(__file__).parents[1] / "experiments" / "examples"
SMALL = {"steps": 2, "batch_size": 8, "mesh": "8x1", "dtype": "float32"}


def example(name):
    found = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.main


def test_importing_starts_nothing():
    code = ("import sys, distilbert_jax as dj\n"
            "assert 'teacher' in dj.distil.__doc__ and dj.__version__\n"
            "heavy = {'jax', 'numpy', 'transformers', 'distilbert_jax.config'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("job, given, message", [
    (dj.distil, {"student_layer": 3}, "unknown setting 'student_layer'; did you mean student_"),
    (dj.distil, {"alpha_cse": 1.0}, "unknown setting 'alpha_cse'; did you mean alpha_ce?"),
    (dj.distil, {"corpus": "c"}, "--teacher is missing"),
    (dj.distil, {"recipe": "rxn-bert"}, "unknown --recipe 'rxn-bert'; did you mean rxn_bert?"),
    (dj.distil, {"recipe": 5}, "unknown --recipe '5' (known: "),
    (dj.distil, {"teacher": "t", "alphas": 3}, "alphas 3 must hold weights by name"),
    (dj.distil, {"teacher": "t", "alpha_ce": None}, "--alpha-ce None must be a number"),
    (dj.distil, {"teacher": "t", "corpus": "c", "compile_only": "v5e:2x4"}, "leaves no student"),
    (dj.finetune, {"modell": "m"}, "unknown setting 'modell'; did you mean model?"),
    (dj.finetune, {"alpha_ce": 1.0}, "unknown setting 'alpha_ce'"),  # of another job
    (dj.embed, {"corpse": "c"}, "unknown setting 'corpse'; did you mean corpus?"),
    (dj.ship, {"format": "onnx"}, "unknown setting 'format'; did you mean formats?"),
])
def test_what_cannot_be(job, given, message):
    with pytest.raises(dj.UserError) as error:
        job(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_as_a_person_writes_them():
    made = settings({"teacher": Path("t"), "corpus": ["a.txt", Path("b.txt")],
                     "student_layers": [0, 2], "alpha_mse": 0.5, "alpha_mlm": 0.0})
    assert (made.teacher, made.corpus, made.student_layers) == (("t",), ("a.txt", "b.txt"), "0,2")
    assert made.alphas == {"ce": 5.0, "mlm": 0.0, "cos": 1.0, "mse": 0.5}
    assert settings({"corpus": "c", "alphas": {"ce": 1.0}, "alpha_cos": 2.0}).alphas == {
        "ce": 1.0, "cos": 2.0}
    made = settings({"recipe": "rxn_bert", "steps": 5})
    assert made.steps == 5 and made.batch_size == recipes()["rxn_bert"].DISTIL["batch_size"]


def test_nothing_given_is_the_quickstart():
    quick = recipes()["quickstart"].DISTIL
    made = settings({"steps": 7})
    assert (made.recipe, made.steps, made.corpus) == ("quickstart", 7, quick["corpus"])
    assert not settings({"teacher": "t"}).recipe and not settings({"corpus": "c"}).recipe


@pytest.fixture(scope="module")
def distilled(toy, tmp_path_factory):
    """The example, in a thread of a program that plots and has arguments of its own."""
    output, found = tmp_path_factory.mktemp("api") / "small", []

    def work():
        found.append(example("distil")(
            toy / "teacher", str(toy / "corpus.txt"), output=output, sequence_length=16,
            student_layers=1, **SMALL))

    def used(*_, **__):
        raise AssertionError("the backend for plots is the notebook's")

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["notebook", "--secret"])
        patch.setattr("matplotlib.use", used)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    return toy, output, *found


def test_a_distillation_in_a_thread(distilled):
    toy, output, result = distilled
    assert result.path == output and result.student == output / "student"
    assert result.report == json.loads((output / "report.json").read_text())
    models = result.report["models"]
    assert models["student"]["layers"] == 1 and models["teacher"]["layers"] == 2
    text = (output / "report.md").read_text()
    assert f"`distilbert_jax.distil(teacher='{toy / 'teacher'}', corpus=" in text
    assert "student_layers=1" in text and "secret" not in text
    assert issubclass(dj.Interrupted, Exception)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.path = output


def test_a_result_in_a_notebook(distilled):
    """It shows the table and the curves of its report."""
    _, output, result = distilled
    shown = result._repr_html_()
    top1 = 100 * result.report["models"]["student"]["top1"]
    assert f"{top1:.2f}</td>" in shown and "<h2" not in shown
    picture = base64.b64encode((output / "losses.png").read_bytes()).decode()
    assert shown.count("<table>") == 1 and f'base64,{picture}"' in shown


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_report_of_a_run_in_a_browser(distilled, tmp_path):
    """Its curve and the interval at its end are drawn, in the colours of the plot."""
    _, output, _ = distilled
    colours = seen(output / "report.html", tmp_path, (1300, 1200))
    assert max(colours, key=colours.get) == (251, 251, 249)
    assert colours[255, 255, 255] > 300 * 500  # the ground of the plot
    for drawn, least in (((31, 119, 180), 300), ((255, 127, 14), 50)):  # scaled, so not exact
        assert least < sum(count for colour, count in colours.items() if np.allclose(
            colour, drawn, atol=40)), drawn


def test_a_result_answers(distilled):
    *_, result = distilled
    words = result.predictor().fill_mask(["ba [MASK] ba"], top=3)[0][0]
    assert len(words) == 3 and all(0 <= probability <= 1 for _, probability in words)
    with pytest.raises(dj.UserError, match="onnx/model.onnx does not exist"):
        result.predictor("onnx")


def test_the_provenance_is_that_of_the_thread_that_calls():
    from distilbert_jax.evaluation import report

    seen = []
    with report.called("one"):
        thread = threading.Thread(target=lambda: seen.append(report.call()))
        thread.start()
        thread.join()
        with report.called("two"):
            seen.append(report.call())
        seen.append(report.call())
    assert seen + [report.call()] == ["called from Python", "two", "one", "called from Python"]


def test_the_example_of_a_task(toy, tmp_path, capsys):
    words = ("ba", "be")
    for name, count in (("train", 24), ("dev", 9)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(
            f"{' '.join([words[i % 2]] * (1 + i // 2 % 9))},{words[i % 2]}\n"
            for i in range(count)))
    result = example("finetune")(
        toy / "teacher", tmp_path / "train.csv", tmp_path / "dev.csv", student_layers=[1],
        output=tmp_path / "task", baseline=False, **SMALL)
    assert result.student == tmp_path / "task" / "model"
    assert set(result.report["parts"]["dev"]) == {"teacher", "distilled"}
    answer, = result.predictor().classify(["ba ba"])
    assert set(answer) == set(words) and sum(answer.values()) == pytest.approx(1)
    assert "distilled: score " in capsys.readouterr().out


def test_the_example_of_a_sentence_encoder(toy, tmp_path, capsys):
    result = example("embed")(
        toy / "teacher", toy / "corpus.txt", pooling="mean", student_layers=1, choose="even",
        output=tmp_path / "embed", valid_share=0.1, max_length=16, **SMALL)
    assert result.student == tmp_path / "embed" / "student"
    near = result.report["to_teacher"]["student"]["mean"]
    assert f"mean {near:.3f}" in capsys.readouterr().out
    vectors = result.predictor().embed(["ba be", "bu"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_the_example_of_a_smaller_vocabulary(toy, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Ba BAUE ba baue\nbaue daue daue\n" * 9)
    example("smaller_vocabulary")([
        str(toy / "teacher"), str(tmp_path / "text.txt"), "--words", "17", "--layers", "1,",
        "--pooling", "mean", "--output", str(tmp_path / "start")])
    made, teacher = Named.read(str(tmp_path / "start")), Named.read(str(toy / "teacher"), "mean")
    (own, words), (theirs, known) = (
        (named.params["embeddings"]["word"]["embedding"], named.tokenizer.get_vocab())
        for named in (made, teacher))
    shared = words.keys() & known.keys()
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ba", "##u", "##e"} <= shared
    for word in shared:
        np.testing.assert_array_equal(own[words[word]], theirs[known[word]], err_msg=word)
    split = {"baue": ["ba", "##u", "##e"], "##aue": ["##a", "##u", "##e"]}
    assert not split.keys() & known.keys()
    for word, pieces in split.items():
        mean = theirs[[known[piece] for piece in pieces]].mean(0)
        np.testing.assert_allclose(own[words[word]], mean, rtol=1e-6, err_msg=word)
    assert made.tokenizer.tokenize("BAUE") == ["baue"]
    np.testing.assert_array_equal(made.params["layers"][0]["attention"]["query"]["kernel"],
                                  teacher.params["layers"][1]["attention"]["query"]["kernel"])
    assert f"start: {len(words)} words, {len(shared)} of them" in capsys.readouterr().out
    result = dj.embed(
        teacher=toy / "teacher", corpus=toy / "corpus.txt", pooling="mean",
        student=tmp_path / "start", output=tmp_path / "embed", valid_share=0.1, max_length=16,
        **SMALL | {"steps": 1})
    trained = Named.read(str(result.student))
    assert trained.tokens == made.tokens and len(own) == trained.shape.vocab_size
    assert np.abs(trained.params["embeddings"]["word"]["embedding"] - own).max() > 0
