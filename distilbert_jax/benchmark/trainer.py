"""The Hugging Face Trainer on labelled examples, as a side of a benchmark."""

import tempfile
import time
from typing import Any

import numpy as np
import torch
import transformers

from distilbert_jax.benchmark.sides import peak_bytes
from distilbert_jax.benchmark.task import TaskProblem


class Collator:
    """Numbers of examples → a padded batch; counts what is computed."""

    def __init__(self, problem: TaskProblem, padded: bool):
        """Pad every example to the task's length, or each batch to its longest."""
        self._examples, self._width = problem.examples, problem.max_length if padded else None
        self._label_type = np.float32 if problem.shape.task == "regress" else np.int64
        self.real = self.computed = 0  # tokens

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        examples = self._examples.some(np.array(rows))
        width = self._width or int(examples.lengths.max())
        out = {name: np.zeros((len(rows), width), np.int64)
               for name in ("input_ids", "token_type_ids", "attention_mask")}
        for i, size in enumerate(examples.lengths):
            out["input_ids"][i, :size] = examples.ids[i]
            out["token_type_ids"][i, :size] = examples.types[i]
            out["attention_mask"][i, :size] = 1
        self.real += int(examples.lengths.sum())
        self.computed += len(rows) * width
        out["labels"] = np.concatenate(examples.labels).astype(self._label_type)
        return {name: torch.from_numpy(x) for name, x in out.items()}


class Clock(transformers.TrainerCallback):
    """From the beginning of the first update to the end of the last."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.perf_counter() - self._began


class TrainerSide:
    """transformers.Trainer with its own loop, optimizer and data loader."""

    def __init__(self, problem: TaskProblem, padded: bool, began: float):
        """Load the model and make the first update.

        Args:
            problem: the examples and settings.
            padded: whether every example is padded to the task's length, the default of
                run_glue.py; if not, each batch is padded to its longest.
            began: when the process was started.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._problem, self._clock = problem, Clock()
        self._collator = Collator(problem, padded)
        self._model = transformers.AutoModelForSequenceClassification.from_pretrained(
            problem.folder, num_labels=problem.shape.num_labels, problem_type="regression" if
            problem.shape.task == "regress" else "single_label_classification")
        self._trainer(1).train()
        self._first = time.time() - began
        self._whole = self._trainer(problem.updates)

    def ready(self) -> None:
        """Nothing has to be known before the first round."""

    def round(self) -> float:
        """Examples per second, of its updates alone."""
        self._whole.train()
        problem = self._problem
        return problem.updates * problem.config.batch_size / self._clock.seconds

    def end(self) -> dict[str, Any]:
        """What is known of it beside its speed."""
        return {"first_update_seconds": self._first, "process_bytes": peak_bytes(),
                "padding": 1 - self._collator.real / self._collator.computed}

    def _trainer(self, updates: int) -> transformers.Trainer:
        config = self._problem.config
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=updates, report_to="none",
            per_device_train_batch_size=config.batch_size, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, learning_rate=config.learning_rate,
            weight_decay=config.weight_decay, max_grad_norm=config.clip, seed=config.seed,
            remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
            bf16=config.dtype == "bfloat16")
        trainer = transformers.Trainer(
            model=self._model, args=arguments, data_collator=self._collator,
            train_dataset=list(range(len(self._problem.examples))), callbacks=[self._clock])
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer
