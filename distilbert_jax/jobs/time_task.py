"""Time our training for a task beside the Hugging Face Trainer's, on the user's own data."""

from importlib.util import find_spec

from distilbert_jax.benchmark import task as sides
from distilbert_jax.benchmark.settings import TaskBenchmark
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.jobs.task_data import read_task
from distilbert_jax.jobs.task_model import EPOCHS, Job, start_of
from distilbert_jax.machine.sharding import make_mesh
from distilbert_jax.models import hub
from distilbert_jax.task_config import FinetuneConfig


def time_task(config: TaskBenchmark) -> str:
    """Measure, and give the table.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    for library in ("torch", "accelerate"):
        if len(config.sides) > 1 and not find_spec(library):
            raise UserError(f"{library} is not installed, which the Hugging Face Trainer needs: "
                            "pip install torch accelerate, or --sides ours")
    model = hub.load(config.model)
    tokenizer = load_tokenizer(config.model, model.config.vocab_size)
    run = FinetuneConfig(
        model=config.model, task=config.task, data=config.data, text=config.text,
        label=config.label, kind=config.kind, max_length=config.max_length, train=config.train,
        dev=config.dev, batch_size=config.batch_size, dtype=config.dtype, learning_rate=5e-5)
    task = read_task(run, tokenizer, model.config.positions, train=config.train, dev=config.dev)
    if task.kind == "tag":
        raise UserError("the benchmark compares models of whole texts: tags are not compared")
    shape, params = start_of(Job(run, task, tokenizer, make_mesh("")), model,
                             list(range(model.config.num_hidden_layers)), run.seed)
    train = task.parts["train"].examples
    found = sides.measure(sides.TaskProblem(
        run, str(model.folder), model.family.model_type, shape, params, train,
        task.task.max_length, config.updates, config.rounds), config.sides)
    return sides.table(found, len(train), task.task.epochs if config.task else EPOCHS)
