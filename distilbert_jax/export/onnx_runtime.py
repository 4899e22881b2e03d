"""An ONNX file → a function that answers, by ONNX Runtime; neither JAX nor PyTorch is imported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def load(path: Path, threads: int = 1) -> Callable[[np.ndarray, np.ndarray, np.ndarray],
                                                   np.ndarray]:
    """Open a file on the CPU.

    Args:
        path: of an .onnx file with the inputs input_ids, attention_mask and perhaps
            token_type_ids.
        threads: of a product; by itself the library would take all cores, and wait spinning.

    Returns:
        A function of ids, mask and types, [B, T] int64 each, that returns the first output; a row
        longer than the model's positions raises.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised, and need not be printed too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [given.name for given in session.get_inputs()]

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return session.run(None, {name: known[name] for name in inputs})[0]

    return run
