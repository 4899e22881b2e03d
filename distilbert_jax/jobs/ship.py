"""Ship a model: a Hugging Face folder → further formats in it, each kept if it passed the gate."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distilbert_jax.benchmark import serving_table
from distilbert_jax.benchmark.latency import file_latencies
from distilbert_jax.benchmark.serving import FILES
from distilbert_jax.config import LoopConfig, cpu_flags
from distilbert_jax.data import sources
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError, first_line
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.page import FILES as REPORTS
from distilbert_jax.evaluation.page import write_report
from distilbert_jax.export import huggingface
from distilbert_jax.export.exportable import Exportable
from distilbert_jax.export.formats import DEFAULT, FORMATS, Format, check_formats
from distilbert_jax.export.gate import Figures, Gate, Trial
from distilbert_jax.jobs.setup import Setup
from distilbert_jax.jobs.ship_page import write_page
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.jobs.trials import of_packed, trial_of
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.progress import say
from distilbert_jax.models import hub
from distilbert_jax.ship_config import ShipConfig

REPORT = "report.json"  # with "formats" in it, what else we wrote is ours to replace
UNDER_WAY = ".shipping"  # folder in which files wait for the gate
LENGTHS = (32, 128)  # tokens of the rows that are timed
# Figure → its column in report.md, and how it is written there.
COLUMNS = {
    "top1": ("top-1 [%]", "{:.2%}"), "perplexity": ("perplexity", "{:.4f}"),
    "score": ("score", "{:.4f}"), "same": ("same answers [%]", "{:.2%}"),
    "correlation": ("correlation", "{:.6f}"), "cosine_mean": ("cosine, mean", "{:.6f}"),
    "cosine_worst": ("cosine, worst", "{:.6f}"),
    "difference": ("largest difference", "{:.1e}"), "padding": ("of padding", "{:.1e}")}


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A format that was written: its size, seconds and figures, and why it was refused if it was.
    """

    bytes: int
    seconds: float  # to write it
    figures: Figures
    problems: list[str]


def ship(config: ShipConfig) -> Path:
    """Write `config.formats` into the folder of the model, or into a copy of it.

    Returns:
        The folder.

    Raises:
        UserError: anything in the settings or files that the user can mend; or a format did not
            pass the gate, was deleted, and the others are there.
    """
    names = config.formats or DEFAULT
    check_formats(names)
    found = hub.load_any(config.model)
    folder = _target(config, found.folder)
    model = Exportable.of(found)
    tokenizer = load_tokenizer(str(found.folder), model.config.vocab_size)
    _check_ours(folder, found.folder, names)
    trial = trial_of(config, model, found.labels, tokenizer)
    with _errors_about(folder):
        if folder != found.folder:
            _copy(found.folder, folder, model)
        ship_into(folder, model, trial, names, {"reduce_range": config.reduce_range})
        if config.demo:
            say(f"page: {write_page(folder, model.output, trial.texts, tokenizer, config.teacher)}")
    return folder


def check_ship(config: LoopConfig) -> None:
    """Raise a UserError before a training if its --ship lacks libraries."""
    if config.ship:
        check_formats(DEFAULT)


def ship_held_out(folder: Path, setup: Setup) -> None:
    """Ship a masked language model that a run has exported, judged on what the run held out.

    Raises:
        UserError: as for ship.
    """
    ship_exported(folder, of_packed(setup.data.valid, setup.tokenizer))


def ship_exported(folder: Path, trial: Trial) -> None:
    """Write the default formats into a folder that a job has just exported.

    Raises:
        UserError: as for ship.
    """
    with _errors_about(folder):
        ship_into(folder, Exportable.of(hub.load_any(str(folder))), trial, DEFAULT, {})


def ship_into(
    folder: Path, model: Exportable, trial: Trial, names: Sequence[str], options: dict[str, Any]
) -> None:
    """Write formats into the folder of a model, each if it passes the gate, and the report.

    The folder may be pushed to the hub: no path of this machine is written into it.

    Args:
        folder: of the model; what else is in it stays.
        model: what is shipped.
        trial: on which each format is judged.
        names: rows of FORMATS.
        options: settings that some formats take.

    Raises:
        UserError: a format did not pass, and was deleted.
    """
    if "int8" in names and not options.get("reduce_range") and not _vnni():
        say("this CPU has no VNNI: its products of 8 bits saturate beyond ±63, which costs "
            "accuracy here (--reduce-range)")
    say(f"ship: our model answers {trial.text}")
    gate = Gate(model, trial)
    digest = seal.fingerprint(model.params)
    before = read_json(folder / REPORT)
    shipped = before.get("formats", {}) if before.get("weights") == digest else {}
    for name in dict.fromkeys(names):
        done = _ship_one(folder, FORMATS[name], gate, options)
        said = ", ".join(f"{COLUMNS[key][0].split(' [')[0]} {COLUMNS[key][1].format(value)}"
                         for key, value in done.figures.items() if key in COLUMNS)
        say(f"{name}: {done.bytes / 1e6:.1f} MB written in {done.seconds:.1f} s; {said}; "
            + (f"refused: {'; '.join(done.problems)}" if done.problems else FORMATS[name].path))
        shipped[name] = dataclasses.asdict(done)
    content = {"model": folder.name, "output": model.output, "weights": digest,
               "trial": trial.text, "ours": gate.own, "formats": shipped,
               "latency": _latency(folder, model, [
                   name for name in names if not shipped[name]["problems"]]),
               "command": sources.published_call(report.call()),
               "versions": report.versions()}
    seal.write_json(folder / REPORT, content)
    write_report(folder, _page(content))
    refused = {name: shipped[name]["problems"] for name in names if shipped[name]["problems"]}
    if refused:
        raise UserError("; ".join(
            f"{name} is refused and deleted: {'; '.join(problems)}"
            for name, problems in refused.items()) + f" (judged on {trial.text})")
    say(f"shipped: {folder}")


def _latency(folder: Path, model: Exportable, names: Sequence[str]) -> dict[str, Any]:
    """How fast the files of these formats are, with one thread, and on which CPU."""
    load = os.getloadavg()[0]
    runs = {name: FORMATS[name].load(folder / FORMATS[name].path) for name in FILES
            if name in names}
    lengths = sorted({min(length, model.config.positions) for length in LENGTHS})
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in runs}
    for length in lengths:
        for name, times in file_latencies(runs, length, model.config.vocab_size).items():
            found[name][f"1 × {length}"] = times
    return {"milliseconds": found,
            "where": serving_table.caption((load, os.getloadavg()[0]))}


def _vnni() -> bool:
    """Whether products of 8 bits are summed up in 32 bits here, as far as is known."""
    known = cpu_flags()
    return not known or any("vnni" in name for name in known)


def _ship_one(folder: Path, row: Format, gate: Gate, options: dict[str, Any]) -> Shipped:
    """Write a format beside its place, judge it there, and move it in or delete it."""
    waiting, place = folder / UNDER_WAY, folder / row.path
    shutil.rmtree(waiting, ignore_errors=True)
    try:
        began = time.perf_counter()
        written = row.write(gate.model, waiting, **{
            name: options[name] for name in row.options if name in options})
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (written, *written.rglob("*"))
                   if path.is_file())
        try:
            run = row.load(written)
        except Exception as error:  # each runtime has its own
            said = first_line(error).replace(f"{waiting}{os.sep}", "")
            figures, problems = {}, [f"its runtime does not load it: {said}"]
        else:
            figures, problems = gate.judge(run, row.limits, size)
        _remove(place)
        if not problems:
            place.parent.mkdir(parents=True, exist_ok=True)
            written.rename(place)
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return Shipped(size, seconds, figures, problems)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _target(config: ShipConfig, source: Path) -> Path:
    """The folder that is written into, checked.

    Raises:
        UserError: it is in a bucket or on the hub, lies within the model's, or cannot be written.
    """
    if not config.output:
        if not Path(config.model).is_dir():
            raise UserError(f"--model {config.model} is no folder of this machine: give --output "
                            "for a copy of it")
        if not os.access(source, os.W_OK):
            raise UserError(f"--model {config.model} cannot be written into: give --output for a "
                            "copy of it")
        return source
    if store.is_remote(config.output):
        raise UserError(f"--output {config.output}: a model is shipped to a folder of this machine")
    output, inner = Path(config.output), Path(config.output).resolve()
    if inner == source.resolve():
        return source
    if source.resolve() in inner.parents or inner in source.resolve().parents:
        raise UserError(f"--output {config.output} and --model {config.model} lie within each "
                        "other: name another --output")
    return output


def _check_ours(folder: Path, source: Path, names: Sequence[str]) -> None:
    """Raise a UserError if files would be replaced that no shipment has made."""
    if "weights" in read_json(folder / REPORT):
        return
    if folder != source and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is there and was not made by this command: name a new "
                        "folder")
    made = (REPORT, *REPORTS, *(FORMATS[name].path for name in names))
    if theirs := [name for name in made if (source / name).exists()]:
        if folder == source or "weights" not in read_json(source / REPORT):
            raise UserError(f"{source / theirs[0]} was not made by this command and would be "
                            "replaced: move it away first")


def _copy(source: Path, folder: Path, model: Exportable) -> None:
    """Copy all files of a model, whatever the rights of the original are.

    A tokenizer that only transformers 5 would load gets the name that 4 knows too.
    """
    for name in store.files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if read_json(settings).get("tokenizer_class") == huggingface.NEW_CLASS:
        huggingface.generalise(settings, model.config)


@contextlib.contextmanager
def _errors_about(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or first_line(error)}"
                        ) from error


def _page(content: dict[str, Any]) -> str:
    """report.md of what report.json holds."""
    ours, shipped = content["ours"], content["formats"]
    latency = content["latency"]["milliseconds"]
    known = [key for key in COLUMNS
             if key in ours or any(key in row["figures"] for row in shipped.values())]
    shapes = list(dict.fromkeys(shape for times in latency.values() for shape in times))
    columns = ("format", "file", "size [MB]", "written in [s]", *(
        COLUMNS[key][0] for key in known), *(f"{shape} [ms]" for shape in shapes))

    def cells(figures: Figures) -> list[str]:
        return [COLUMNS[key][1].format(figures[key]).rstrip("%") if key in figures else ""
                for key in known]

    def times(name: str) -> list[str]:
        own = latency.get(name, {})
        return ["{:.1f} ({:.1f})".format(*own[shape]) if shape in own else "" for shape in shapes]

    rows = [("float32 in JAX", "model.safetensors", "", "", *cells(ours), *times(""))]
    for name, row in shipped.items():
        rows.append((FORMATS[name].text, "refused" if row["problems"] else FORMATS[name].path,
                     f"{row['bytes'] / 1e6:.2f}", f"{row['seconds']:.1f}",
                     *cells(row["figures"]), *times(name)))
    refused = "".join(f"- {name} was refused: {'; '.join(row['problems'])}\n"
                      for name, row in shipped.items() if row["problems"])
    return (f"# {content['model']}, shipped\n\n{report.table(rows, columns)}\n\n{refused}\n"
            f"Judged in each format's own runtime on {content['trial']}.\n\nLatency: rows × "
            "tokens, one thread, median (95th percentile) of 30 in turn. "
            f"{content['latency']['where']} Beside the teacher in PyTorch: "
            f"`distilbert-jax benchmark latency --model {content['model']} --teacher DIR`.\n\n"
            f"`{content['command']}`\n\n{content['versions']}\n")
