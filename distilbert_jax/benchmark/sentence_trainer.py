"""The layer reduction of sentence-transformers, by its trainer, as a side of a benchmark."""

import tempfile
from typing import Any

import datasets
import sentence_transformers
import torch
import transformers
from sentence_transformers.sentence_transformer import losses

from distilbert_jax.benchmark.sentences import SentenceProblem, updates_in
from distilbert_jax.benchmark.sides import peak_bytes
from distilbert_jax.benchmark.trainer import Clock

RATE, WARMUP = 1e-4, 0.1  # of its example of layer reduction


class SentenceTrainerSide:
    """SentenceTransformerTrainer with MSELoss on vectors that are given."""

    def __init__(self, problem: SentenceProblem, began: float):
        """Load the start, and make a first update.

        Args:
            problem: sentences, vectors and settings; `folder` is that of the start.
            began: when the process was started; not needed.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        self._problem, self._clock, self._timed = problem, Clock(), []
        self._data = datasets.Dataset.from_dict(
            {"sentence": problem.sentences, "label": problem.vectors})
        self._model = self._start()
        self._trainer(1).train()
        self._whole = self._trainer(problem.updates)

    def ready(self) -> None:
        """Nothing has to be known before the first round."""

    def round(self) -> float:
        """Sentences per second, of its updates alone."""
        self._whole.train()
        problem = self._problem
        self._timed.append(problem.updates * problem.config.batch_size / self._clock.seconds)
        return self._timed[-1]

    def end(self) -> dict[str, Any]:
        """Train from the start for the problem's time; the vectors of its texts."""
        steps = updates_in(self._problem, self._timed, 0.0)
        self._model = self._start()
        self._trainer(steps).train()
        vectors = self._model.encode(self._problem.texts, show_progress_bar=False)
        return {"updates": steps, "seconds": self._clock.seconds, "vectors": vectors,
                "process_bytes": peak_bytes()}

    def _start(self) -> sentence_transformers.SentenceTransformer:
        return sentence_transformers.SentenceTransformer(self._problem.folder, device="cpu")

    def _trainer(self, updates: int) -> sentence_transformers.SentenceTransformerTrainer:
        config = self._problem.config
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=updates, report_to="none",
            per_device_train_batch_size=config.batch_size, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, learning_rate=RATE, warmup_steps=WARMUP,
            seed=config.seed, use_cpu=not torch.cuda.is_available(),
            bf16=config.dtype == "bfloat16")
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=self._model, args=arguments, train_dataset=self._data,
            loss=losses.MSELoss(self._model), callbacks=[self._clock])
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer
