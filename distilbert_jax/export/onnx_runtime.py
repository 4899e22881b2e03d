"""An ONNX file → a function that answers, by ONNX Runtime; neither JAX nor PyTorch is imported."""

from pathlib import Path

import numpy as np


class OnnxModel:
    """A file on the CPU, called as a `Run`: ids, mask and types → the first output."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Open a file.

        Args:
            path: of an .onnx file with the inputs input_ids, attention_mask and perhaps
                token_type_ids.
            threads: of a product; by itself the library would take all cores, and wait spinning.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised, and need not be printed too
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"])
        self._inputs = [given.name for given in self._session.get_inputs()]
        self.output_name = self._session.get_outputs()[0].name

    def __call__(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        """Answer rows of [B, T] int64 each; one longer than the model's positions raises."""
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return self._session.run(None, {name: known[name] for name in self._inputs})[0]
