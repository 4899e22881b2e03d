"""The command line: flags, recipes, and one line for whatever cannot be."""

import dataclasses
import re
from pathlib import Path

import pytest

from distilbert_jax import config
from distilbert_jax.cli import parse
from distilbert_jax.commands.main import COMMANDS
from distilbert_jax.config import (
    AblationConfig,
    DistilConfig,
    PrepareConfig,
    PretrainConfig,
    compute_dtype,
    flag,
)
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.ship_config import ShipConfig
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig
from distilbert_jax.training.losses import LOSSES

RECIPES = {"short": {"steps": 7, "batch_size": 16, "alphas": {"ce": 5.0, "cos": 0.5}}}


def distil(*argv):
    return parse(DistilConfig, "distil", "Distil.", argv, RECIPES)


def test_no_flags_are_the_defaults():
    assert distil() == DistilConfig()


def test_flags_of_every_kind():
    got = distil("--corpus", "a.txt", "b.txt", "--steps", "30", "--learning-rate", "1e-3",
                 "--teacher=folder", "--no-fold-token-type", "--restrict-ce-to-mask")
    assert got == DistilConfig(
        corpus=("a.txt", "b.txt"), steps=30, learning_rate=1e-3, teacher="folder",
        fold_token_type=False, restrict_ce_to_mask=True)


def test_every_field_is_a_flag_of_its_type():
    for config_class in (DistilConfig, PretrainConfig, PrepareConfig):
        for field in dataclasses.fields(config_class):
            if "each" in field.metadata:
                continue  # a flag for each loss: below
            if isinstance(field.default, bool):
                argv, value = [flag(field.name)], True
            elif field.name == "mix":
                argv, value = ["--corpus", "a", "b", "--mix", "0.7", "2"], (0.7, 2.0)
            elif field.name == "teacher_weights":
                argv, value = ["--teacher", "a", "b", "--teacher-weights", "0.7", "2"], (0.7, 2.0)
            elif not field.default and "choices" in field.metadata:
                value = field.metadata["choices"][0]
                argv = [flag(field.name), value]
            else:
                value = field.default or ("x",) if isinstance(field.default, tuple) else (
                    field.default or (3 if field.name == "steps" else
                                      type(field.default)(0)))
                argv = [flag(field.name), *(value if isinstance(value, tuple) else [str(value)])]
                argv += ["--kept-maskings", "1"] if field.name == "states" else []
            if value != "":
                got = getattr(parse(config_class, "", "", argv, {str(value): {}}), field.name)
                assert got == value and type(got) is type(value)


def test_defaults_then_recipe_then_flags():
    got = distil("--recipe", "short", "--batch-size", "32")
    assert (got.steps, got.batch_size, got.alphas) == (7, 32, {"ce": 5.0, "cos": 0.5})
    assert got.recipe == "short"


@pytest.mark.parametrize("argv, message", [
    (["--stepz", "3"], "unknown flag '--stepz'; did you mean --steps?"),
    (["--zzz", "3"], "unknown flag '--zzz' (see --help)"),
    (["--batch_size", "3"], "did you mean --batch-size?"),
    (["--batch", "3"], "unknown flag '--batch'"),  # no abbreviations
    (["--recipe", "shrot"], "unknown --recipe 'shrot'; did you mean short? (known: short)"),
    (["--steps", "many"], "--steps: invalid int value: 'many' (see --help)"),
    (["--steps"], "--steps: expected one argument"),
    (["stray"], "unrecognized arguments: stray"),
    ([""], "unrecognized arguments"),
    (["--no-fold-token-type=yes"], "--no-fold-token-type"),
])
def test_command_lines_that_cannot_be(argv, message):
    with pytest.raises(UserError) as error:
        distil(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "known: --" not in str(error.value)  # the nearest is enough


@pytest.mark.parametrize("config_class, name, values", [
    (DistilConfig, "sequence_length", (7, 65536)),
    (DistilConfig, "workers", (-1,)),
    (DistilConfig, "mix", ((1.0,),)),
    (PrepareConfig, "sequence_length", (7, 65536)),
    (PrepareConfig, "shard", ("", "1", "2/2", "0/0", "-1/2", "1/-2", "0/2/3", "a/b", " 0/2")),
    (DistilConfig, "steps", (0, -1)),
    (DistilConfig, "batch_size", (0,)),
    (DistilConfig, "accumulate", (0, 3)),  # 3 does not divide 128
    (DistilConfig, "learning_rate", (0.0, -1.0, float("inf"), float("nan"))),
    (DistilConfig, "clip", (0.0, float("nan"))),
    (DistilConfig, "weight_decay", (-0.1, float("nan"))),
    (DistilConfig, "warmup", (-0.1, 1.0)),
    (DistilConfig, "dropout", (-0.1, 1.0)),
    (DistilConfig, "optimizer", ("adam",)),
    (DistilConfig, "valid_share", (0.0, 1.0)),
    (DistilConfig, "mask_rate", (0.0, 1.0, -0.15, float("nan"))),
    (DistilConfig, "seed", (-1,)),
    (DistilConfig, "save_every", (0,)),
    (DistilConfig, "eval_every", (0,)),
    (DistilConfig, "dtype", ("float16",)),
    (DistilConfig, "init", ("zeros",)),
    (DistilConfig, "temperature", (0.0, float("inf"))),
    (PretrainConfig, "vocab_size", (99,)),
    (PretrainConfig, "num_hidden_layers", (0,)),
    (PretrainConfig, "num_attention_heads", (0, 3)),  # 3 does not divide 256
])
def test_values_that_cannot_be_name_their_flag(config_class, name, values):
    for value in values:
        with pytest.raises(UserError) as error:
            parse(config_class, "", "", [f"{flag(name)}={value}"])
        assert flag(name) in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("vocab_size", 500), ("lowercase", False), ("hidden_size", 512), ("num_hidden_layers", 6),
    ("num_attention_heads", 8)])
def test_a_model_that_is_trained_further_has_its_own_shape(name, value):
    PretrainConfig(**{name: value})
    with pytest.raises(UserError, match=f"{flag(name)} {value} is for a model from nothing, and"):
        PretrainConfig(model="teacher", **{name: value})


def losses_of(config_class):
    field = next(f for f in dataclasses.fields(config_class) if f.name == "alphas")
    return [name for name, row in LOSSES.items() if row.needs in field.metadata["needs"]]


@pytest.mark.parametrize("config_class, name", [
    (each, name) for each in (DistilConfig, FinetuneConfig) for name in losses_of(each)])
def test_every_loss_has_a_flag(config_class, name):
    def written(*words):
        more = [] if config_class is DistilConfig else ["--model", "m"]
        return parse(config_class, "", "", [*more, *words])

    given = written(f"--alpha-{name}", "3.5")
    assert given.alphas == written().alphas | {name: 3.5}
    assert given.meaning()[f"--alpha-{name}"] == 3.5
    for value in ("-1.0", "inf", "nan"):
        with pytest.raises(UserError, match=f"--alpha-{name} {value} must be 0 or a positive"):
            written(f"--alpha-{name}={value}")


def test_every_loss_belongs_to_a_job():
    assert set(LOSSES) == {
        name for job in (DistilConfig, FinetuneConfig, EmbedConfig) for name in losses_of(job)}


def test_what_a_continuation_may_change():
    """Fields marked free or compared by content are no part of a run's meaning."""
    free = {f.name for f in dataclasses.fields(DistilConfig) if "continued" in f.metadata}
    assert free == {
        "steps", "mesh", "remat", "output", "save_every", "eval_every", "keep", "on_save_error",
        "max_skipped", "recipe", "workers", "compile_only", "corpus", "states", "valid",
        "teacher", "teacher_weights",
        "student", "ship", "finish", "log_to"}
    meaning = DistilConfig().meaning()
    assert not {flag(name) for name in free} & set(meaning)
    assert meaning["--choose"] == "even" and meaning["--mask-rate"] == 0.15
    assert meaning["--temperature"] == 2.0 and meaning["--alpha-ce"] == 5.0


def test_an_ablation_is_no_run_of_its_own(capsys):
    """What it refuses is refused by name, and is not in its help."""
    with pytest.raises(SystemExit):
        COMMANDS["ablate"](["--help"])
    text = capsys.readouterr().out
    assert "\n  --seeds " in text and "\n  --seed " in text
    for name in ("compile_only", "finish", "states"):
        with pytest.raises(UserError, match=f"{flag(name)} (best holds|belongs to distil)"):
            parse(AblationConfig, "ablate", "", ["--kept-maskings", "1", flag(name), "best"])
        assert flag(name) not in text


def test_a_student_of_its_own_is_no_part_of_the_teacher():
    for other in (dict(student_layers="2"), dict(init="random"), dict(choose="greedy")):
        with pytest.raises(UserError, match="--student small is a start of its own: leave out"):
            DistilConfig(student="small", **other)


def test_all_losses_off():
    with pytest.raises(UserError, match="all loss weights are 0"):
        DistilConfig(alphas={"ce": 0.0, "mlm": 0.0})


@pytest.mark.parametrize("config_class", [
    DistilConfig, PretrainConfig, PrepareConfig, FinetuneConfig, EmbedConfig, ShipConfig,
    EvaluateConfig])
def test_help_names_every_flag_once(config_class, capsys):
    with pytest.raises(SystemExit) as end:
        parse(config_class, "distil", "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in text
    for field in dataclasses.fields(config_class):
        names = [field.name]
        if field.name == "alphas":
            names = [f"alpha_{name}" for name in losses_of(config_class)]
        assert all(f"\n  {flag(name)} " in text or f"\n  {flag(name)}," in text
                   for name in names)
        assert text.count(f"\n{field.metadata['group']}:\n") == 1
    assert ("(default: 0.0005)" in text) == (config_class in (DistilConfig, PretrainConfig))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "benchmark"])
def test_help_is_true_of_its_own_job(name, capsys):
    """It names no flag that the job has not, no passes that it does not make, no bucket that it
    refuses (test_cli.py)."""
    with pytest.raises(SystemExit):
        COMMANDS[name](["--help"])
    text = capsys.readouterr().out.split("\noptions:\n")[1].split("\nexamples:\n")[0]
    known = {word for line in re.findall(r"(?m)^  (?:-h, )?--.*", text)
             for word in re.findall(r"--[a-z-]+", line.split("  ")[1])}
    options = " ".join(text.split())
    assert set(re.findall(r"--[a-z-]+", options)) <= known
    passes = {"distil": "three passes", "pretrain": "three passes", "ablate": "three passes",
              "finetune": "as many as --epochs says", "embed": "as many as --epochs says"}
    if name in passes:
        assert f"--steps INT updates; default: {passes[name]}" in options
    if "--output" in known:
        about = options.split(" --output DIR ")[1].split(" --")[0]
        assert ("gs://" in about) == (name in ("distil", "pretrain", "prepare"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_flag_takes(name, capsys):
    """Numbers, files, folders or the words themselves; then examples, and the other commands."""
    if name == "benchmark":
        return  # has commands of its own
    with pytest.raises(SystemExit):
        COMMANDS[name](["--help"])
    text = capsys.readouterr().out
    flags, _, end = text.partition("\nexamples:\n")
    taken = dict(re.findall(r"\n  (--[\w-]+) (\S+)", flags))
    assert "X" not in taken.values() and not {"--output", "--model"} & {
        flag for flag, kind in taken.items() if kind != "DIR"}
    assert all(taken.get(flag, kind) == kind for flag, kind in {
        "--dtype": "auto|float32|bfloat16|float64", "--steps": "INT", "--clip": "FLOAT",
        "--mesh": "DATAxMODEL", "--corpus": "FILE", "--text": "COLUMN"}.items())
    assert f"    distilbert-jax {name} " in end or f"    distilbert-jax {name}\n" in end
    others = end.rpartition("other commands (distilbert-jax NAME --help): ")[2].strip()
    assert {*others.split(", "), name} == set(COMMANDS)


@pytest.mark.parametrize("config_class", [
    DistilConfig, PretrainConfig, FinetuneConfig, EmbedConfig, ShipConfig, EvaluateConfig])
def test_only_words_of_a_setting_are_accepted(config_class):
    least = {"model": "m", "teacher": "t", "corpus": "c"}
    known = {field.name: field for field in dataclasses.fields(config_class)}
    least = {name: value for name, value in least.items() if name in known}
    if config_class in (ShipConfig, EvaluateConfig):
        least = {"model": "m"}
    for name, field in known.items():
        for word in field.metadata.get("choices", ()):
            if name not in ("choose", "log_to"):  # goes with other settings, or with a library
                assert getattr(config_class(**least, **{name: word}), name) == word
        if "choices" in field.metadata:
            with pytest.raises(UserError, match=f"unknown {flag(name)} 'floot32'"):
                config_class(**least | {name: "floot32"})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistilConfig().steps = 3


def test_choose_lists_what_is_known():
    assert choose("a", {"a": 1}, "thing") == "a"
    with pytest.raises(UserError, match=r"unknown thing 'zzz' \(known: a, b\)"):
        choose("zzz", ["b", "a"], "thing")


@pytest.mark.parametrize("name, platform, flags, dtype", [
    ("auto", "tpu", "", "bfloat16"), ("auto", "gpu", "", "bfloat16"),
    ("auto", "cpu", "avx2 avx512f avx512_vnni", "float32"), ("auto", "cpu", "", "float32"),
    ("auto", "cpu", "avx512f avx512_bf16", "bfloat16"),
    ("auto", "cpu", "avx512f amx_bf16 amx_tile", "bfloat16"),
    ("float32", "gpu", "", "float32"), ("bfloat16", "cpu", "", "bfloat16"),
    ("float32", "cpu", "avx512_bf16", "float32")])
def test_the_dtype_of_products(name, platform, flags, dtype, monkeypatch):
    monkeypatch.setattr(config, "cpu_flags", flags.split)
    assert compute_dtype(name, platform) == dtype


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError(" ")) == "ValueError"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(ValueError("Invalid keys:\n  a, b\nand more")) == "Invalid keys: a, b"


def test_only_the_ratio_of_weights_counts():
    """And one teacher is the case of a list of one."""
    for weights, shares in (((7.0, 3.0), (0.7, 0.3)), ((), (0.5, 0.5)),
                            ((1e9, 1e-300), (1.0, 0.0))):
        made = DistilConfig(teacher=[Path("a"), "b"], teacher_weights=weights)
        assert made.teacher == ("a", "b") and made.shares == pytest.approx(shares, abs=1e-300)
    for one in (DistilConfig(teacher="a"), DistilConfig(teacher="a", teacher_weights=0.3)):
        assert one.shares == (1.0,) and one.meaning() == DistilConfig().meaning()


def test_what_a_person_writes_in_python():
    written = DistilConfig(teacher=Path("a/b"), corpus="one.txt", valid=[Path("c"), "d"], mix=0.5,
                           student_layers=6, output=Path("out"))
    assert written == DistilConfig(
        teacher=("a/b",), corpus=("one.txt",), valid=("c", "d"), mix=(0.5,), student_layers="6",
        output="out")
    assert DistilConfig(student_layers=[0, 2]).student_layers == "0,2"


@pytest.mark.parametrize("name, value", [
    ("steps", "1"), ("batch_size", 8.0), ("seed", True), ("learning_rate", "1e-3"),
    ("valid_share", None), ("corpus", 5), ("corpus", b"a"), ("mix", "1")])
def test_values_of_another_kind_from_python(name, value):
    """The checks of the settings themselves, without the type checker of the tests."""
    with pytest.raises(UserError, match=flag(name)):
        config._as_flag(next(f for f in dataclasses.fields(DistilConfig) if f.name == name), value)
