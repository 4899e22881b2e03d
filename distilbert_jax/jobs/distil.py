"""The two jobs, from settings to a finished folder: distil a teacher, or train one.

Everything that can be wrong is checked before the first file is written.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.benchmark.latency import latencies
from distilbert_jax.config import (
    DistilConfig,
    Masking,
    PretrainConfig,
    TrainConfig,
    check,
    compute_dtype,
    flag,
)
from distilbert_jax.data import pack, sources
from distilbert_jax.data.prepare import is_prepared, prepare
from distilbert_jax.data.tokenize import load_tokenizer, train_wordpiece
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.held_out import held_out
from distilbert_jax.export.huggingface import export
from distilbert_jax.export.predict import fill_mask
from distilbert_jax.machine import store
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import (
    first_process_first,
    make_mesh,
    replicated,
    rows_each,
    shardings,
    to_host,
)
from distilbert_jax.models import bert, convert, distilbert, student
from distilbert_jax.models.encoder import EncoderConfig, graphdef, init_params
from distilbert_jax.training.checkpoint import refuse_other_run
from distilbert_jax.training.labels import Vocabulary, vocabulary
from distilbert_jax.training.metrics_log import read_metrics
from distilbert_jax.training.optimizer import make_optimizer
from distilbert_jax.training.train import Run, train
from distilbert_jax.training.train_step import (
    Objective,
    init_state,
    make_eval_step,
    make_train_step,
)

EVALUATION_ROWS = 128  # while training; the report takes all of them


@dataclasses.dataclass(frozen=True)
class Setup:
    """What both jobs have once their input is read."""

    config: TrainConfig
    mesh: Mesh
    dtype: Any  # of the matrix products
    param_dtype: Any
    tokenizer: Any
    data: pack.Prepared
    vocabulary: Vocabulary
    steps: int
    settings: dict[str, Any]


def distil(config: DistilConfig) -> Path:
    """Distil `config.teacher` and leave student, figures and report in `config.output`.

    Returns:
        The folder of the exported student.

    Raises:
        UserError: anything in the settings or files that the user can mend.
        Interrupted: stopped by a signal, state saved.
    """
    if not config.teacher:
        raise UserError("--teacher is missing: give a Hugging Face BERT folder (or start without "
                        "any flag for the quickstart)")
    teacher = convert.load(config.teacher)
    if not teacher.config.mlm_head:
        raise UserError(f"{config.teacher} has no masked-language-model head to distil from; "
                        f"train one: python experiments/pretrain.py --model {config.teacher} ...")
    settings = _settings(config, teacher.params)
    mesh, dtype, param_dtype = check_job(config, teacher.config, settings)
    layers = student.choose_layers(config.student_layers, teacher.config.num_hidden_layers)
    shape = student.student_config(teacher.config, len(layers), config.dropout)
    setup = _prepare(config, mesh, dtype, param_dtype, load_tokenizer(
        config.teacher, teacher.config.vocab_size), settings)

    start = student.student_params(teacher.params, layers, config.fold_token_type)
    if config.init == "random":
        start = init_params(shape, config.seed, param_dtype)
    start = _cast(start, param_dtype)
    graphs = (graphdef(shape, dtype, param_dtype, config.remat),
              graphdef(teacher.config, dtype, param_dtype))
    frozen_teacher = _on(mesh, student.frozen_params(teacher.params, dtype))
    trained = _train(
        setup, graphs, start, frozen_teacher, Objective.of(config), Masking(), "distil",
        config.frozen)

    folder = store.local(config.output) / "student"
    figures = {"student": _evaluator(setup, graphs, frozen_teacher)(trained),
               "at start": _evaluator(setup, (graphs[0], None), {})(_on(mesh, start))}
    trained = to_host(trained)
    with first_process_first():
        if jax.process_index() == 0:
            export(folder, trained, shape, distilbert, setup.tokenizer,
                   _card(config, layers, figures["student"], trained))
            _write_report(setup, graphs, (trained, start, teacher.params), figures)
            store.upload(config.output, "student", "report.md", "losses.png")
    return folder


def pretrain(config: PretrainConfig) -> Path:
    """Train a BERT with the masked-language-model loss, from scratch or from `config.model`.

    Returns:
        The folder of the exported model, `OUTPUT/model`.

    Raises:
        UserError, Interrupted: as for distil.
    """
    source = convert.load(config.model) if config.model else None
    shape, family = (source.config, source.family) if source else (scratch_shape(config), bert)
    settings = _settings(config, source.params if source else None)
    mesh, dtype, param_dtype = check_job(config, shape, settings)
    own = store.join(config.output, "tokenizer")
    learnt = store.exists(store.join(own, "tokenizer_config.json"))
    if source or learnt:
        tokenizer = load_tokenizer(config.model or own, shape.vocab_size if source else None)
    else:
        tokenizer = _learnt_tokenizer(config)
    shape = dataclasses.replace(
        shape, vocab_size=len(tokenizer), mlm_head=True, pooler=False,
        hidden_dropout=config.dropout, attention_dropout=config.dropout)
    setup = _prepare(config, mesh, dtype, param_dtype, tokenizer, settings)
    if not source and not learnt and jax.process_index() == 0:
        new = store.local(config.output) / "tokenizer.new"
        tokenizer.save_pretrained(new)
        shutil.rmtree(store.local(own), ignore_errors=True)
        new.rename(store.local(own))
        store.upload(own)

    start = init_params(shape, config.seed, param_dtype)
    if source is not None:
        start |= {name: part for name, part in source.params.items() if name in start}
    start = _cast(start, param_dtype)
    graph = graphdef(shape, dtype, param_dtype, config.remat)
    uniform = Masking(smoothing=0.0)  # as BERT was trained; rare words first would be slow
    trained = _train(setup, (graph, None), start, {}, Objective(), uniform, "train teacher")

    output = store.local(config.output)
    figures = _evaluator(setup, (graph, None), {})(trained)
    trained = to_host(trained)
    card = (f"# {shape.num_hidden_layers}-layer BERT\n\nTrained by distilbert_jax with the "
            f"masked-language-model loss; held-out top-1 {figures['top1']:.2%}, perplexity "
            f"{figures['perplexity']:.3f}.\n\n{report.versions()}\n")
    with first_process_first():
        if jax.process_index() == 0:
            export(output / "model", trained, shape, family, setup.tokenizer, card)
            report.plot(read_metrics(config.output), output / "losses.png",
                        "masked-language-model training")
            store.upload(config.output, "model", "losses.png")
    print(f"model: {store.join(config.output, 'model')} (held-out top-1 {figures['top1']:.2%}, "
          f"perplexity {figures['perplexity']:.2f})")
    return output / "model"


def scratch_shape(config: PretrainConfig) -> EncoderConfig:
    """The BERT that is trained from scratch; its vocabulary may come out smaller."""
    return EncoderConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, type_vocab_size=2,
        num_hidden_layers=config.num_hidden_layers, intermediate_size=4 * config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=max(512, config.sequence_length),
        initializer_range=0.02 * math.sqrt(768 / config.hidden_size))  # BERT-base's, scaled


def check_job(
    config: TrainConfig, shape: EncoderConfig, settings: dict[str, Any] | None = None
) -> tuple[Mesh, Any, Any]:
    """Check all that can be known before tokenizer and corpus are read.

    Args:
        config: of the job.
        shape: of the teacher or, without one, of the trained model.
        settings: what a continuation must share, as far as it is known; default: of `config`.

    Returns:
        The mesh, and the dtypes of matrix products and parameters.

    Raises:
        UserError: about layers, positions, corpus, an earlier run, or devices.
    """
    if isinstance(config, DistilConfig):
        student.choose_layers(config.student_layers, shape.num_hidden_layers)
    if not config.corpus:
        raise UserError("--corpus is missing: give text or JSON-lines files, a datasets name ...")
    check(config, "sequence_length", config.sequence_length <= shape.max_position_embeddings,
          f"is beyond the model's {shape.max_position_embeddings} positions")
    sources.check([*config.corpus, *config.valid])
    is_prepared(config.corpus)
    store.check_writable(config.output)
    with _told(config.output):
        refuse_other_run(config.output, settings or _settings(config))
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(config.mesh)
    rows_each(config, mesh)
    name = compute_dtype(config.dtype, jax.default_backend())
    return mesh, jnp.dtype(name), jnp.promote_types(name, jnp.float32)


def _settings(config: TrainConfig, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a continuation must share, known before the corpus is read.

    The model it starts from is what its weights are, not where they lie.
    """
    places = ("corpus", "valid", "teacher", "model")
    settings = {flag(f.name): getattr(config, f.name) for f in dataclasses.fields(config)
                if f.name not in (*TrainConfig.HARMLESS, *places)}
    if params is not None:
        settings["--teacher" if isinstance(config, DistilConfig) else "--model"] = (
            fingerprint(params))
    return settings


def _data_settings(data: pack.Prepared) -> dict[str, Any]:
    """The same of the corpus: what came out of its preparation, not where it was read."""
    def outcome(part: pack.PackedRows) -> str:
        return fingerprint(np.frombuffer(json.dumps(part.manifest, sort_keys=True).encode(),
                                         np.uint8))

    return {"--corpus": outcome(data.train), "--valid": outcome(data.valid),
            "tokenizer": data.manifest["request"]["tokenizer"]}


def _learnt_tokenizer(config: PretrainConfig) -> Any:
    """The tokenizer trained on the corpus, without its held-out part."""
    if is_prepared(config.corpus):
        raise UserError(f"--corpus {config.corpus[0]} is prepared for another tokenizer, and none "
                        "can be learnt from it: give texts, or --model")
    documents = (d for d in sources.Documents(config.corpus, config.mix)
                 if config.valid or not sources.is_held_out(d, config.valid_share))
    return train_wordpiece(documents, config.vocab_size)


@contextlib.contextmanager
def _told(output: str) -> Iterator[None]:
    """Turn what the file system raises into one line that names the flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder; take it away again if what follows fails and leaves it empty."""
    new = []
    try:
        with _told(str(path)):
            new = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _prepare(config: TrainConfig, mesh: Mesh, dtype: Any, param_dtype: Any, tokenizer: Any,
             settings: dict[str, Any]) -> Setup:
    """Bring the corpus into packed rows."""
    with (_folder(store.local(config.output)), first_process_first(),
          report.counting("prepare") as progress):
        data = prepare(config, tokenizer, store.join(config.output, "data"), progress)
    print(report.describe_data(data.manifest))
    words = vocabulary(data.train.counts, tokenizer.all_special_ids, tokenizer.mask_token_id)
    return Setup(config, mesh, dtype, param_dtype, tokenizer, data,
                 jax.device_put(words, replicated(mesh)), config.updates(len(data.train)),
                 settings | _data_settings(data))


def _train(
    setup: Setup, graphs: tuple[nnx.GraphDef, nnx.GraphDef | None], start: dict[str, Any],
    teacher_params: dict[str, Any], objective: Objective, masking: Masking, label: str,
    frozen: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train from `start`, and give the parameters."""
    config = setup.config
    tx = make_optimizer(config, setup.steps, frozen)
    run = Run(
        config=config, steps=setup.steps, settings=setup.settings, output=config.output,
        mesh=setup.mesh, rows=setup.data.train, vocabulary=setup.vocabulary, label=label,
        train_step=make_train_step(
            *graphs, tx, objective, masking, config.accumulate, setup.mesh),
        evaluate=_evaluator(setup, graphs, teacher_params, EVALUATION_ROWS))
    return train(run, init_state(start, tx, config.seed), teacher_params).params


@functools.cache  # the loop and the report take the same one
def _eval_step(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef | None], mesh: Mesh
) -> Callable[..., Any]:
    return jax.jit(make_eval_step(*graphs, mesh))


def _evaluator(
    setup: Setup, graphs: tuple[nnx.GraphDef, nnx.GraphDef | None],
    teacher_params: dict[str, Any], rows: int | None = None,
) -> Callable[[dict[str, Any]], dict[str, float]]:
    """A function from parameters to held-out figures, on `rows` rows or all."""
    return functools.partial(
        held_out, _eval_step(graphs, setup.mesh), teacher_params=teacher_params,
        vocabulary=setup.vocabulary, packed=setup.data.valid, mesh=setup.mesh, rows=rows)


def _cast(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """On the host, so that the step may take over what is put on the devices."""
    return jax.tree.map(lambda x: np.asarray(x, dtype), params)


def _on(mesh: Mesh, params: dict[str, Any]) -> dict[str, Any]:
    return jax.device_put(params, shardings(params, mesh))


def _card(config: DistilConfig, layers: list[int], figures: dict[str, float],
          params: dict[str, Any]) -> str:
    """The model card of the student."""
    weights = ", ".join(f"{name} {getattr(config, name)}" for name in (
        "alpha_ce", "alpha_mlm", "alpha_cos", "alpha_mse", "temperature"))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n"
        f"# A {len(layers)}-layer DistilBERT\n\n"
        f"Distilled by distilbert_jax from `{Path(config.teacher).name}`, whose layers "
        f"{', '.join(map(str, layers))} it started from "
        f"({'initialised at random' if config.init == 'random' else 'weights copied'}).\n\n"
        f"- parameters: {report.count_parameters(params):,}\n"
        f"- held-out masked-token top-1: {figures['top1']:.2%}, teacher "
        f"{figures['teacher_top1']:.2%}; retention {figures['retention']:.2%}\n"
        f"- corpus: {' '.join(config.corpus)}\n- losses: {weights}\n"
        f"- {report.versions()}\n\n"
        "```python\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        "model = AutoModelForMaskedLM.from_pretrained(\"student\")  # this folder\n"
        "tokenizer = AutoTokenizer.from_pretrained(\"student\")\n```\n")


def _write_report(
    setup: Setup, graphs: tuple[nnx.GraphDef, nnx.GraphDef],
    params: tuple[dict[str, Any], ...], figures: dict[str, dict[str, float]],
) -> None:
    """Print the result, and write report.md and losses.png."""
    config, output = setup.config, store.local(setup.config.output)
    trained, start, teacher = params
    models = {"teacher": (graphs[1], teacher), "student": (graphs[0], trained),
              "student at start": (graphs[0], start)}
    speed = latencies(models, config.sequence_length)
    last, first = figures["student"], figures["at start"]
    teacher_figures = {"top1": last["teacher_top1"], "perplexity": last["teacher_perplexity"]}
    text = report.table([
        report.model_row(name, models[name][1], measured, last["teacher_top1"], speed[name])
        for name, measured in zip(models, (teacher_figures, last, first), strict=True)])
    against = (f"Against the teacher: KL {last['kl']:.4f} nats per masked token, cosine of the "
               f"last hidden states {last['cosine']:.4f}, latency "
               f"{speed['teacher'] / speed['student']:.2f} times lower.")
    metrics = read_metrics(config.output)
    report.plot(metrics, output / "losses.png", f"{Path(config.teacher).name} → student")
    example = _example(setup, models)
    where = (f"Held-out: {last['masked']:,.0f} masked tokens of {len(setup.data.valid):,} rows, "
             f"the same for every model. Latency: {config.sequence_length} tokens, "
             f"batch 1, {setup.dtype}, median of 30. Trained {metrics[-1]['step']:,} updates on "
             f"{metrics[-1]['tokens_seen']:,.0f} tokens in {metrics[-1]['seconds'] / 60:.1f} min.")
    (output / "report.md").write_text(
        f"# Distillation of {Path(config.teacher).name}\n\n{text}\n\n{against}\n\n{where}\n\n"
        f"![losses](losses.png)\n\n## Fill-mask\n\n{example}\n\n## Provenance\n\n"
        f"`{shlex.join(['python', *sys.argv])}`\n\n{report.versions()}\n", encoding="utf-8")
    plot, page, folder = (store.join(config.output, name) for name in (
        "losses.png", "report.md", "student"))
    print(f"\n{text}\n\n{against}\n{where}\n\n{example}\n\nplot: {plot}\nreport: {page}\n"
          f"student: {folder}")


def _example(setup: Setup, models: dict[str, tuple[nnx.GraphDef, dict[str, Any]]]) -> str:
    """Both models fill one hidden token of the first held-out document."""
    tokenizer, valid = setup.tokenizer, setup.data.valid
    ids = np.array(valid.rows[0][:valid.segments[0][0]], np.int32)
    ordinary = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
    position = int(ordinary[len(ordinary) // 2])
    truth, ids[position] = tokenizer.decode([int(ids[position])]), tokenizer.mask_token_id
    lines = [f"    {tokenizer.decode(ids[max(1, position - 20):position + 21])}", "",
             f"hidden: {truth}", ""]
    for name in ("teacher", "student"):
        answers = fill_mask(*models[name], ids, position)
        lines.append(f"- {name}: " + ", ".join(
            f"{tokenizer.decode([word])} ({share:.1%})" for word, share in answers))
    return "\n".join(lines)
