"""A Hugging Face folder in PyTorch, called as the formats of `export/` are.

Imported only where it is timed, because PyTorch is optional (the extra `parity`).
"""

import inspect
from pathlib import Path

import numpy as np
import torch
import transformers

CLASSES = {
    "mlm": transformers.AutoModelForMaskedLM, "states": transformers.AutoModel,
    "tag": transformers.AutoModelForTokenClassification,
    "classify": transformers.AutoModelForSequenceClassification,
    "regress": transformers.AutoModelForSequenceClassification}


class TorchModel:
    """The model of transformers, eager, in float32, called as a `Run`."""

    def __init__(self, folder: Path, output: str, threads: int) -> None:
        """Load a folder.

        Args:
            folder: of the model.
            output: what it answers, see Exportable; a head that is not there is random.
            threads: of a product.
        """
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._model = CLASSES[output].from_pretrained(folder, dtype=torch.float32).eval()
        self._typed = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self._field = "last_hidden_state" if output == "states" else "logits"

    def __call__(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        """Answer rows of [B, T] int64 each."""
        given = {"input_ids": ids, "attention_mask": mask}
        given |= {"token_type_ids": types} if self._typed else {}
        with torch.inference_mode():
            found = self._model(**{name: torch.from_numpy(x) for name, x in given.items()})
        return getattr(found, self._field).numpy()
