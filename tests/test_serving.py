"""The benchmark of serving: every runtime answers as ours does; no time is asserted."""

import os
import shutil

import numpy as np
import pytest
from test_stablehlo import batch

from distilbert_jax.benchmark import serving, serving_table, sides
from distilbert_jax.benchmark.serving import RUNTIMES, Contender, Server
from distilbert_jax.benchmark.settings import ServingBenchmark
from distilbert_jax.errors import UserError
from distilbert_jax.export import litert, onnx, onnx_int8
from distilbert_jax.export.exportable import Exportable
from distilbert_jax.jobs import time_serving
from distilbert_jax.models import hub


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """A model with the files that are there to be timed: LiteRT's only with its libraries."""
    place = tmp_path_factory.mktemp("shipped") / "student"
    shutil.copytree(toy / "teacher", place)
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is in the extra `serve`")
    model = Exportable.of(hub.load(str(place)))
    onnx.write(model, place)
    onnx_int8.write(model, place)
    if not Contender(place, "litert", "mlm", "student").lacks().startswith("pip"):
        try:
            litert.write(model, place, (24,))
        except ImportError:
            pass
    return place


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_answer_alike(runtime, folder):
    contender = Contender(folder, runtime, "mlm", "student")
    if lack := contender.lacks():
        pytest.skip(lack)
    given = batch(2, 16, hub.load(str(folder)).config.vocab_size)
    real = given[1].astype(bool)
    ours = Contender(folder, "jax", "mlm", "student").open(1)(*given)[real]
    found = contender.open(1)(*given)[real]
    if runtime in ("int8", "litert"):
        assert np.corrcoef(found.ravel(), ours.ravel())[0, 1] > 0.97
    else:
        np.testing.assert_allclose(found, ours, atol=1e-4)
    assert contender.bytes > 1000


def test_a_round_is_its_own_batches(folder, monkeypatch):
    """One batch of each shape to warm up, then those of the round."""
    seen = []
    monkeypatch.setattr(Contender, "open", lambda *_: lambda ids, *_: seen.append(ids.shape))
    one, two, three = (batch(1, n) for n in (3, 5, 7))
    server = Server(Contender(folder, "jax", "mlm", "student"), 1,
                    {"a": [[one], [one]], "texts": [[two, three], [two]]}, 0.0)
    assert seen == [(1, 3), (1, 5), (1, 7)]
    seen.clear()
    times = server.round(), server.round()
    assert seen == [(1, 3), (1, 5), (1, 7), (1, 3), (1, 5)]
    assert all(set(found) == {"a", "texts"} for found in times)


def test_processes_are_pinned_and_settings_put_back(monkeypatch):
    before, name = os.sched_getaffinity(0), "MALLOC_TRIM_THRESHOLD_"
    monkeypatch.delenv(name, raising=False)
    with serving._pinned(1), sides._environment({name: "1"}):
        assert os.sched_getaffinity(0) == {max(before)} and os.environ[name] == "1"
    assert os.sched_getaffinity(0) == before and name not in os.environ


def test_table(folder):
    """Ratios are medians over rounds, of wall times; the first side is 1."""
    sides = [Contender(folder, runtime, "mlm", "student") for runtime in ("torch", "int8")]
    found = [[{"1×8": (0.010, 0.008)}, {"1×8": (0.020, 0.008)}, {"1×8": (0.030, 0.009)}],
             [{"1×8": (0.005, 0.002)}, {"1×8": (0.005, 0.002)}, {"1×8": (0.005, 0.002)}]]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in serving_table.of_requests(sides, found, ["1×8"]).splitlines()]
    assert rows[2][:2] == ["student", "PyTorch, float32"]
    assert rows[2][3:] == ["20.0 (29.0)", "8.0", "1.00"]
    assert rows[3][3:] == ["5.0 (5.0)", "2.0", "4.00"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in serving_table.of_texts(sides, found, "1×8", 6).splitlines()]
    assert rows[2][3:] == ["0.1", "0.0", "10.0", "1.00"] and rows[3][5:] == ["2.5", "4.00"]


def test_caption_says_what_decides():
    said = serving_table.caption((0.5, 2.25))
    assert "avx512_vnni " in said and "amx_int8 " in said and "jax " in said
    assert "0.50 before, 2.25 after" in said


def test_the_whole_benchmark(folder, toy, monkeypatch):
    """Two runtimes, in processes of their own, with the user's texts as further requests."""
    monkeypatch.setattr(time_serving, "SHAPES", ((1, 8), (2, 8)))
    texts = folder.parent / "texts.txt"
    texts.write_text("".join(f"ba be bu {word}\n" for word in ("da", "fa fe", "ga", "ka ku")))
    page = time_serving.time_serving(ServingBenchmark(
        model=folder, teacher=toy / "teacher", runtimes=("jax", "int8"), threads=(1,), rounds=2,
        evaluate=texts)) if serving.find_spec("torch") else ""
    if not page:
        pytest.skip("PyTorch is what the others are compared with")
    assert page.count("| teacher |") == 2 and page.count("| student |") == 4
    assert "1 thread, 4 rows of" in page and "1×8: ms (p95)" in page


@pytest.mark.parametrize("words, said", [
    ({}, "--model is missing"), ({"model": "x", "rounds": 0}, "--rounds 0 must be at least 1"),
    ({"model": "x", "threads": (0,)}, "--threads 0 must be at least 1"),
    ({"model": "x", "runtimes": ("onyx",)}, "did you mean onnx?")])
def test_settings_are_refused(words, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        ServingBenchmark(**words)


def test_more_threads_than_cpus_are_refused(folder):
    with pytest.raises(UserError, match="--threads 999: each side is pinned to as many CPUs"):
        time_serving.time_serving(ServingBenchmark(model=folder, threads=(999,)))


def test_models_for_other_things_are_refused(folder, toy, tmp_path):
    """A sentence encoder beside a masked language model."""
    other = tmp_path / "encoder"
    shutil.copytree(toy / "teacher", other)
    (other / "modules.json").write_text("[]")
    with pytest.raises(UserError, match="do not answer the same: .*encoder: states"):
        time_serving.time_serving(ServingBenchmark(
            model=(str(folder), str(other)), runtimes="jax", threads=1))
