"""Sentence encoders distilled from end to end: six updates as torch's, what is left, stopped and
started again, judged."""

import contextlib
import copy
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from test_card import files_that_name
from test_examples import examples
from test_provenance import next_commands
from test_sharding import mesh_of

from distilbert_jax import predict
from distilbert_jax.data.examples import lay, rows_of
from distilbert_jax.data.tokenize import load_tokenizer, train_wordpiece
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import intervals, report, similarity
from distilbert_jax.export.formats import FORMATS
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs import teacher_vectors
from distilbert_jax.jobs.embed import embed
from distilbert_jax.jobs.evaluate import evaluate
from distilbert_jax.jobs.finetune import finetune
from distilbert_jax.jobs.kept_parts import KeptParts
from distilbert_jax.jobs.sentence_data import read_all_pairs, read_pairs, read_titles
from distilbert_jax.jobs.sentence_model import Named, on_devices, own_start
from distilbert_jax.models import bert
from distilbert_jax.models.convert import from_hf, to_hf
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.sentence_modules import Sentence
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig
from distilbert_jax.training import train as loop
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.metrics_log import read_metrics

WORDS = [a + b for a in "bdfgklmn" for b in "aeu"]
LENGTHS = [9, 5, 12, 7, 3, 8]
CONFIG = EmbedConfig(
    teacher="t", corpus="c", dtype="float64", learning_rate=2e-3, warmup=0.5, weight_decay=0.1,
    clip=0.5, batch_size=6, output="o")


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "DRAWS", 50)
        patch.setattr(teacher_vectors, "PART", 64)
        from distilbert_jax.benchmark import static_vectors

        patch.setattr(static_vectors, "distil", lambda folder: (None, "model2vec is not there"))
        yield


def torch_vectors(model, found):
    """Mean of each text's states, of length 1, a text at a time."""
    import torch

    means = [model(torch.tensor(ids)[None].long(),
                   token_type_ids=torch.tensor(types)[None].long()).last_hidden_state[0].mean(0)
             for ids, types in zip(found.ids, found.types, strict=True)]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def test_six_updates_equal_torch_with_the_mse_loss(torch_model, x64):
    """The loss of sentence_transformers.losses.MSELoss, torch.nn.MSELoss, on cached vectors."""
    import torch

    model = torch_model("BertModel", 1).double()
    tensors = {f"bert.{name}": x.numpy() for name, x in model.state_dict().items()}
    family = FAMILIES["bert"]
    shape, params = from_hf(tensors, family, family.from_hf(model.config.to_dict()))
    params.pop("pooler")
    shape = dataclasses.replace(shape, pooler=False, sentence=Sentence("mean", True),
                                hidden_dropout=0.0, attention_dropout=0.0)
    data = examples(LENGTHS)
    target = torch_vectors(torch_model("BertModel", 2).double(), data).detach()
    width = target.shape[1]
    config = dataclasses.replace(CONFIG, alphas={"vector": 1 / width})
    assembly = assemble(config, family, shape, [shape], mesh_of("1x1"), 6)
    state = assembly.init(assembly.cast(params))
    batch = rows_of(data, lay(LENGTHS, 16), 16, 8, target.numpy()) | {
        "row": np.arange(3, dtype=np.int32), "epoch": np.zeros(3, np.int32)}
    step = jax.jit(assembly.train_step)
    student, steps, warmup = copy.deepcopy(model), 6, 3
    named = {f"bert.{n}": p for n, p in student.named_parameters() if "pooler" not in n}
    adam = torch.optim.AdamW(
        [{"params": [p for p in named.values() if p.ndim > 1]},
         {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0}],
        lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda done: min((done + 1) / warmup, (steps - done) / (steps - warmup + 1)))
    for _ in range(steps):
        state, metrics = step(state, {}, None, batch)
        adam.zero_grad()
        loss = torch.nn.MSELoss()(torch_vectors(student, data), target)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in named.values())).item()
        for p in named.values():
            p.grad *= min(1.0, 0.5 / norm)
        adam.step()
        schedule.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-9)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-9)
    for name, x in to_hf(jax.device_get(state.params["student"]), family).items():
        p = named[name].detach().numpy()
        np.testing.assert_allclose(x, p, rtol=0, atol=1e-9 * abs(p).max(), err_msg=name)


def test_the_mse_loss_of_the_library_is_torch_s():
    losses = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses",
        reason="sentence-transformers is the reference here")
    import torch

    one, other = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))

    class Fixed(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": one}

        def get_embedding_dimension(self):
            return 6

    found = losses.MSELoss(Fixed())([{"input_ids": one}], other)
    assert found.item() == pytest.approx(torch.nn.MSELoss()(one, other).item(), rel=1e-6)


ALL = {"vector": 0.7, "angle": 0.5, "similarity": 0.3, "hidden": 0.2}


def taken(model, teacher, data, rows, length, given, mesh="1x1", alphas=ALL, **config):
    """Loss, gradient norm and new parameters of one update with every loss."""
    settings = dataclasses.replace(CONFIG, alphas=alphas, **config)
    assembly = assemble(settings, FAMILIES["bert"], model[0], [teacher[0]], mesh_of(mesh), 6)
    state = assembly.init(assembly.cast(model[1]))
    teachers = assembly.teachers(teacher[1]) if assembly.teacher_graphs else {}
    batch = rows_of(data, rows, length, 6, given) | {
        "row": np.arange(len(rows), dtype=np.int32), "epoch": np.zeros(len(rows), np.int32)}
    state, metrics = assembly.jitted(state, teachers)(state, teachers, None, batch)
    return jax.device_get((metrics, state.params["student"]))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_is_one_sentence_a_row_on_any_mesh(pooling, tiny_model, x64):
    """Also of similarities within the batch, whose sentences lie on other devices."""
    way = {"mlm_head": False, "sentence": Sentence(pooling, True)}
    model = tiny_model(num_hidden_layers=1, **way)
    teacher = tiny_model(seed=1, num_hidden_layers=2, hidden_dropout=0.3, **way)
    data, given = examples(LENGTHS), np.random.default_rng(0).normal(size=(6, 16))
    alone = taken(model, teacher, data, [[i] for i in range(6)], 16, given)
    for rows, length, more in (
            (lay(LENGTHS, 16), 16, {}), ([[5, 1, 0], [2, 3, 4]], 32, {}),
            ([[i] for i in range(6)] + [[], []], 24, {"mesh": "8x1"}),
            ([[5, 1, 0], [], [2, 3, 4], []], 32, {"mesh": "4x2"}),
            ([[5, 1, 0], [2], [3], [4]], 32, {"accumulate": 2})):
        found = taken(model, teacher, data, rows, length, given, **more)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                     alone, found)
    only = {name: value for name, value in ALL.items() if name != "hidden"}
    cached = taken(model, teacher, data, lay(LENGTHS, 16), 16, given, alphas=only)
    expected = alone[0]["loss"] - 0.2 * alone[0]["hidden"]
    np.testing.assert_allclose(cached[0]["loss"], expected, rtol=1e-12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts, scored pairs and titles of made-up words."""
    folder = tmp_path_factory.mktemp("sentences")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(2, 8))) for _ in range(330)]
    (folder / "corpus.txt").write_text("\n".join(texts))
    pairs = [random.choice(texts, 2) for _ in range(40)]
    (folder / "dev.tsv").write_text("score\tsentence1\tsentence2\n" + "".join(
        f"{len(set(one.split()) & set(two.split())) + 0.5}\t{one}\t{two}\n" for one, two in pairs))
    (folder / "titles.jsonl").write_text("".join(
        json.dumps({"title": text[:6], "text": text}) + "\n" for text in texts[:25]))
    return folder


@pytest.fixture(scope="module")
def teacher(toy, tiny_model, tmp_path_factory):
    """A noisy sentence encoder of 3 layers."""
    from distilbert_jax.export.sentence_folder import export_sentence

    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    shape, params = tiny_model(num_hidden_layers=3, mlm_head=False, vocab_size=len(tokenizer),
                               sentence=Sentence("mean", True))
    export_sentence(folder, params, shape, bert.FAMILY, tokenizer, "A toy.\n", 24, {}, None)
    return folder


def settings(teacher, data, output, **more):
    return EmbedConfig(**{
        "teacher": teacher, "corpus": data / "corpus.txt", "output": output, "student_layers": 2,
        "steps": 60, "batch_size": 16, "learning_rate": 0.01, "mesh": "8x1", "dtype": "float32",
        "max_length": 16, "valid_share": 0.1, "eval_every": 30, "save_every": 30} | more)


@pytest.fixture(scope="module")
def distilled(teacher, data, tmp_path_factory):
    config = settings(teacher, data, tmp_path_factory.mktemp("embed") / "out",
                      sts=data / "dev.tsv", retrieval=data / "titles.jsonl")
    return config, embed(config)


def test_what_is_left(distilled):
    config, folder = distilled
    assert {path.name for path in folder.parent.iterdir()} - {"tensorboard", "lock.json"} == {
        "student", "vectors", "layers.json", "checkpoints", "metrics.jsonl", "metrics.json",
        "report.html", "report.md", "losses.png", "calls.jsonl"}
    page, card = (folder.parent / "report.md").read_text(), (folder / "README.md").read_text()
    for row in ("teacher", "student, untrained", "static vectors (model2vec): model2vec is not",
                "student, trained"):
        assert f"\n| {row} " in page, row
    assert "![losses](losses.png)" in page and " --sts " in page.split("other than the")[1]
    assert "pipeline_tag: sentence-similarity" in card and "recall@10 of the teacher's" in page
    found = json.loads((folder.parent / "metrics.json").read_text())
    (pairs,) = found["pairs"].values()
    assert pairs["student"]["retention"] == pytest.approx(
        pairs["student"]["value"] / pairs["teacher"]["value"])
    search = found["retrieval"]
    assert search["symmetric"]["recall@10 of the teacher's"]["teacher"]["value"] == 1
    assert search["symmetric"]["ndcg@10 of the teacher's"]["teacher"]["value"] == pytest.approx(1)
    assert search["asymmetric"]["recall@10"]["student"]["value"] <= 1
    assert all(speed > 0 for own in found["sentences_per_second"].values() for speed in own)


def test_it_learns(distilled):
    config, folder = distilled
    lines = [line for line in read_metrics(folder.parent) if "worst_cosine" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    near = json.loads((folder.parent / "metrics.json").read_text())["to_teacher"]
    assert near["student"]["mean"] > near["untrained"]["mean"] + 0.05
    assert near["student"]["worst"] <= near["student"]["mean"]


def test_kept_vectors_are_the_live_teacher_s(distilled, teacher):
    """Bit for bit, of the same sentences in the same order."""
    config, folder = distilled
    from distilbert_jax.data.sentences import read

    found = read(config.corpus, (), 0.1, None, "")
    named = Named.read(str(teacher))
    embedder = on_devices(config, mesh_of("8x1"), named)
    tokens = named.examples(found.train, 16)
    parts = sorted((folder.parent / "vectors").glob("*.npy"))
    assert len(parts) > 2
    kept = [np.load(part) for part in parts]
    live = [embedder(tokens.some(np.arange(i * 64, min(len(tokens), i * 64 + 64))))
            for i in range(len(parts))]
    assert all(np.array_equal(one, other) for one, other in zip(kept, live, strict=True))
    np.testing.assert_allclose(np.concatenate(kept), embedder(tokens), atol=1e-6)


def test_layers_are_those_that_change_the_vectors_least(distilled, teacher):
    config, folder = distilled
    found = json.loads((folder.parent / "layers.json").read_text())
    assert len(found["removals"]) == 2 and len(found["removals"][-1]["left"]) == 2
    assert found["removals"][-1]["cosine"] >= found["evenly"] - 1e-6


def test_sentence_transformers_reads_the_student(distilled):
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is the reference here")
    _, folder = distilled
    texts = ["ba be bu", "da", "ka le mu ba be na nu"]
    named = Named.read(str(folder))
    ours = on_devices(EvaluateConfig(model=folder, dtype="float32"), mesh_of("1x1"), named)(
        named.examples(texts))
    np.testing.assert_allclose(
        ours, library.SentenceTransformer(str(folder), device="cpu").encode(texts), rtol=0,
        atol=1e-6)


def test_the_student_is_shipped_and_answers_without_jax(teacher, data, tmp_path, monkeypatch,
                                                        capsys):
    pytest.importorskip("onnxruntime", reason="pip install 'distilbert_jax[serve]'")
    for name, row in FORMATS.items():  # a noisy toy in 8 bits; the limits are tested elsewhere
        monkeypatch.setitem(FORMATS, name, dataclasses.replace(row, limits={}))
    with report.called(f"distilbert-jax embed --teacher {teacher}"):
        folder = embed(settings(teacher, data, tmp_path / "out", steps=2, choose="even", ship=True,
                                retrieval=data / "titles.jsonl"))
    said = capsys.readouterr()
    sizes = json.loads((tmp_path / "out/metrics.json").read_text())["size"]
    models = " → ".join(
        f"{sizes[name]['layers']} layers with {sizes[name]['parameters']:,} parameters"
        for name in ("teacher", "student"))
    assert not next_commands(said.out)  # shipped, and without scored pairs to compare
    assert f"embed: {models}; 2 updates of 16 sentences, 0.1 passes over " in said.err
    assert f"; float32 on 8 x cpu, into {tmp_path / 'out'}\n" in said.err
    assert re.search(r"update 2: held out \((\d+) of \1 sentences\) loss \d", said.err)
    assert not files_that_name(folder, teacher.parent, data, tmp_path)
    found = json.loads((folder / "report.json").read_text())
    assert found["output"] == "states" and set(found["formats"]) == {"onnx", "int8"}
    judged = json.loads((tmp_path / "out/metrics.json").read_text())
    for figures in (judged["to_teacher"], *judged["pairs"].values(), judged["size"],
                    judged["sentences_per_second"],
                    judged["retrieval"]["asymmetric"]["recall@10"]):
        assert "student" in figures and "int8" in figures
    near = judged["to_teacher"]
    assert near["int8"]["mean"] == pytest.approx(near["student"]["mean"], abs=0.02)
    assert near["int8"]["mean"] != near["student"]["mean"]
    assert judged["size"]["int8"]["bytes"] == (
        folder / "onnx/model_quantized.onnx").stat().st_size
    assert "| student, trained, int8 in ONNX Runtime |" in (
        tmp_path / "out/report.md").read_text()
    assert found["trial"].endswith(" sentences that the run held out")
    texts = ["ba be bu", "da", "ka le mu ba be na nu"]
    named = Named.read(str(folder))
    ours = on_devices(EvaluateConfig(model=folder, dtype="float32"), mesh_of("1x1"), named)(
        named.examples(texts))
    np.testing.assert_allclose(predict.load(folder, "onnx").embed(texts), ours, rtol=0, atol=1e-5)


def test_stopped_and_continued_gives_the_same_bytes(teacher, data, tmp_path, monkeypatch):
    more = {"dropout": 0.1, "steps": 8, "save_every": 3, "eval_every": 100, "choose": "even",
            "alphas": {"vector": 1.0, "similarity": 1.0, "hidden": 0.1}}
    straight = embed(settings(teacher, data, tmp_path / "a", **more))
    config, count = settings(teacher, data, tmp_path / "b", **more), iter(range(5))

    class Stop(loop.StopSignal):
        def asked(self):
            return next(count, None) is None

    calls = []

    write = KeptParts._write

    def killed(parts, path, vectors):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(parts, path, vectors)

    with monkeypatch.context() as patch:  # while the teacher is asked
        patch.setattr(KeptParts, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    assert len(list((tmp_path / "b" / "vectors").glob("*.npy"))) == 2
    with monkeypatch.context() as patch:  # while it trains
        patch.setattr(loop, "StopSignal", Stop)
        with pytest.raises(loop.Interrupted):
            embed(config)
    embed(dataclasses.replace(config, finish="last"))
    for name in ("report.md", "student/README.md"):
        assert "this is update 6 of 8, its last checkpoint." in (tmp_path / "b" / name).read_text()
    assert not (tmp_path / "b/student/model.safetensors").read_bytes() == (
        tmp_path / "a/student/model.safetensors").read_bytes()
    continued = embed(config)
    assert "not at its end" not in (tmp_path / "b/report.md").read_text()
    with pytest.raises(UserError, match="--finish last: there is no checkpoint in .*; leave"):
        embed(dataclasses.replace(config, finish="last", output=str(tmp_path / "c")))
    for name in ("student/model.safetensors", *(
            f"vectors/{path.name}" for path in (tmp_path / "a" / "vectors").iterdir())):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert continued.name == straight.name


def test_vectors_that_do_not_fit_are_refused(distilled, toy, teacher, data, tmp_path):
    config, folder = distilled
    shutil.copytree(folder.parent / "vectors", tmp_path / "vectors")
    config = dataclasses.replace(config, output=str(tmp_path / "out"),
                                 vectors=str(tmp_path / "vectors"))
    part = sorted((tmp_path / "vectors").glob("*.npy"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"vectors is damaged \(00001.npy.*: remove it, and the"):
        embed(config)
    part.write_bytes(whole)
    for more, what in (({"teacher": str(toy / "teacher"), "pooling": "mean"}, "teacher"),
                       ({"valid_share": 0.2}, "sentences"), ({"max_length": 12}, "length"),
                       ({"vector_dtype": "float16"}, "dtype")):
        with pytest.raises(UserError, match=f"holds vectors for another {what}.*--vectors"):
            embed(dataclasses.replace(config, student_layers="1", choose="even", **more))
    (tmp_path / "vectors" / "request.json").unlink()
    with pytest.raises(UserError, match="was not made by this command, or its request.json"):
        embed(config)


def test_a_student_of_another_tokenizer_and_width(teacher, data, tiny_model, tmp_path):
    """Only vectors are compared; a Dense brings them to the teacher's width."""
    tokenizer = train_wordpiece([" ".join(WORDS)], 40)
    assert len(tokenizer) < len(load_tokenizer(str(teacher), None))
    shape, params = tiny_model(hidden_size=8, mlm_head=False, vocab_size=len(tokenizer), seed=3)
    export(tmp_path / "small", params, shape, bert.FAMILY.bare, tokenizer, "Small.\n")
    prompted = tmp_path / "teacher"
    shutil.copytree(teacher, prompted)
    (prompted / "config_sentence_transformers.json").write_text(
        '{"prompts": {"all": "da ", "query": "be "}, "default_prompt_name": "all"}')
    config = settings(prompted, data, tmp_path / "out", student=tmp_path / "small", steps=40,
                      student_layers="", vector_dtype="float16")
    named = own_start(config, Named.read(str(prompted)))  # it has no modules.json
    assert named.tokenizer.decode(named.examples(["bu"]).ids[0]) == "[CLS] da bu [SEP]"
    assert named.facts.max_length == Named.read(str(teacher)).facts.max_length
    folder = embed(config)
    assert Named.read(str(folder)).facts.modules.prompts == {"all": "da ", "query": "be "}
    bare = dataclasses.replace(config, teacher=str(teacher), student=str(folder))
    assert own_start(bare, Named.read(str(teacher))).facts.modules.prompt() == "da "  # its own
    assert (folder / "2_Dense" / "model.safetensors").exists()
    named = Named.read(str(folder))
    assert named.shape.hidden_size == 8 and named.width == 16
    lines = [line for line in read_metrics(folder.parent) if "worst_cosine" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(UserError, match="has another tokenizer, prompt or length than"
                       " --teacher: give 0"):
        embed(dataclasses.replace(config, alphas={"vector": 1.0, "hidden": 1.0}))
    with pytest.raises(UserError, match="--choose greedy keeps layers of the teacher"):
        dataclasses.replace(config, choose="greedy", student_layers="1")


def test_any_folder_is_judged(distilled, teacher, toy, data, tmp_path, capsys):
    config, folder = distilled
    common = {"task": "sts", "dev": data / "dev.tsv", "max_length": 16, "dtype": "float32"}
    found = evaluate(EvaluateConfig(**common, model=folder, teacher=teacher,
                                    retrieval=data / "titles.jsonl", output=tmp_path / "judged"))
    left = json.loads((folder.parent / "metrics.json").read_text())
    (name, pairs), = left["pairs"].items()
    assert found[f"spearman, {name}"] == pytest.approx(pairs["student"]["value"], abs=1e-9)
    assert found["recall@10, asymmetric"] == pytest.approx(
        left["retrieval"]["asymmetric"]["recall@10"]["student"]["value"])
    assert f"worst cosine to the teacher, {name}: " in capsys.readouterr().out
    assert json.loads((tmp_path / "judged" / "metrics.json").read_text())["metrics"] == found
    other = evaluate(EvaluateConfig(**common, model=toy / "teacher", pooling="mean"))
    assert other.keys() == {f"spearman, {name}", f"spearman, {name}, 95 % from",
                            f"spearman, {name}, to"}
    with pytest.raises(UserError, match="without modules.json"):
        evaluate(EvaluateConfig(**common, model=toy / "teacher"))
    with pytest.raises(UserError, match="--task sts judges sentence encoders"):
        FinetuneConfig(model=folder, task="sts")
    with pytest.raises(UserError, match="--pooling is for sentence encoders: give --task sts"):
        EvaluateConfig(model=folder, dev=data / "dev.tsv", pooling="mean")


@pytest.mark.parametrize("text, message", [
    ("score\tsentence1\tsentence2\n1\ta\tb\n1.0\tc\td\n", "all 2 scores are 1: no correlation"),
    ("score\tsentence1\tsentence2\n1\ta\tb\nhigh\tc\td\n", ":3: label 'high' is not a finite"),
    ("score\tsentence1\tsentence2\n1\ta\tb\n2\t \td\n", ":3: a sentence of the pair is empty"),
    ("score\tsentence\n1\ta\n2\td\n", "holds single texts: name the two columns")])
def test_pairs_that_cannot_be_judged_on(text, message, tmp_path):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_pairs(str(tmp_path / "pairs.tsv"))
    assert "\n" not in str(error.value)


def test_sick_s_layout_and_titles(tmp_path):
    (tmp_path / "sick.tsv").write_text(
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        "1\ta\tb\t4.5\tNEUTRAL\n2\tb\tc\t1\tNEUTRAL\n")
    found = read_pairs(str(tmp_path / "sick.tsv"))
    assert found.scores == [4.5, 1] and found.texts == ["a", "b", "c"]
    assert (found.left.tolist(), found.right.tolist()) == ([0, 1], [1, 2])
    shutil.copy(tmp_path / "sick.tsv", tmp_path / "sick.dev.tsv")
    names = [str(tmp_path / name) for name in ("sick.tsv", "sick.dev.tsv")]
    assert [part.name for part in read_all_pairs(names)] == names  # else one replaced the other
    assert read_all_pairs(names[:1])[0].name == f"{tmp_path.name}/sick"
    (tmp_path / "t.jsonl").write_text('{"title": "a", "text": ""}\n')
    with pytest.raises(UserError, match="t.jsonl:1: no text in the field 'text'"):
        read_titles([str(tmp_path / "t.jsonl")])


def test_search_by_definition():
    """Query 0 finds its own document third; the teacher's first two are found in turn."""
    first, teacher = np.array([[1, 2, 0]]), np.array([[2, 1, 3]])
    found = similarity.retrieval(first, teacher)
    assert found["recall@10"].tolist() == [1] and found["ndcg@10"] == pytest.approx(1 / 2)
    assert found["recall@10 of the teacher's"] == pytest.approx(2 / 3)
    second, third = 1 / np.log2(3), 1 / 2
    assert found["ndcg@10 of the teacher's"] == pytest.approx(
        (9 + 10 * second) / (10 + 9 * second + 8 * third))
    near = similarity.retrieved(np.eye(3), np.array([[0, 2.0, 0], [5, 1, 0], [0, 0, 1]]))
    assert near[:, 0].tolist() == [1, 0, 2]
    assert similarity.cosines(np.eye(2), np.array([[0.0, 0], [0, 3]])).tolist() == [0, 1]


def test_what_is_kept_of_the_teacher_s_figure():
    """Draw by draw; nothing is said of a figure that is not defined."""
    drawn = np.random.default_rng(0).uniform(0.4, 0.6, 100)
    found = similarity.judged({"teacher": 0.5, "student": 0.45, "constant": None}, {
        "teacher": drawn, "student": 0.9 * drawn, "constant": np.full(100, np.nan)})
    assert found["student"]["retention"] == pytest.approx(0.9)
    assert found["student"]["retention_interval"] == pytest.approx((0.9, 0.9))
    assert found["constant"] == {"value": None, "interval": None}


def test_a_scorer_of_pairs_is_distilled_as_a_task(toy, data, tmp_path):
    """finetune.py --teacher DIR --kind regress --unlabelled pairs.tsv."""
    common = {"dev": data / "dev.tsv", "train": data / "dev.tsv", "steps": 3, "batch_size": 8,
              "mesh": "8x1", "dtype": "float32", "kind": "regress"}
    scorer = finetune(FinetuneConfig(**common, model=toy / "teacher", output=tmp_path / "scorer"))
    lines = (data / "dev.tsv").read_text().splitlines()
    (tmp_path / "pairs.tsv").write_text("\n".join(
        "\t".join(line.split("\t")[:0:-1]) for line in lines).replace(
            "sentence2\tsentence1", "sentence1\tsentence2"))
    folder = finetune(FinetuneConfig(
        **common, teacher=scorer, unlabelled=tmp_path / "pairs.tsv", baseline=False,
        student_layers=1, output=tmp_path / "out"))
    assert np.load(folder.parent / "answers" / "logits.npy").shape == (80, 1)
    assert "spearman" in (folder.parent / "metrics.json").read_text()


def test_the_command_line(teacher, data, tmp_path):
    """The command itself: a mistake is one line."""
    from distilbert_jax.commands.main import embed as main

    with pytest.raises(UserError, match="--alpha-vector -1.0 must be 0 or a positive"):
        main(["--teacher", str(teacher), "--corpus", "c", "--alpha-vector", "-1"])
    with pytest.raises(UserError, match="--corpus is missing"):
        main(["--teacher", str(teacher)])
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError, match="no sentences"):
        (tmp_path / "empty.txt").write_text("\n")
        main(["--teacher", str(teacher), "--corpus", str(tmp_path / "empty.txt"), "--output",
              str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
