"""A Hugging Face folder with an int8 file → a page beside it that runs the model in a browser.

The page is demo.html with what is known of the model written into it. The library is
transformers.js, from the network unless a copy on the page's own server is named.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from distilbert_jax.errors import UserError
from distilbert_jax.export.formats import FORMATS

# Tried with this version; the field in the page, or ?library=PATH, names another.
LIBRARY = "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.1/dist/transformers.min.js"
EMPTY = '<script type="application/json" id="about">{}</script>'


def write(
    folder: Path, output: str, examples: Sequence[tuple[str, ...]] = (),
    teacher: Mapping[str, Any] | None = None,
) -> Path:
    """Write FOLDER.html beside the folder of a model; an older one is replaced.

    Args:
        folder: of the model, with onnx/model_quantized.onnx in it.
        output: what it answers, see Exportable: with "states" the page says how alike two texts
            are.
        examples: texts, or pairs of texts, that the page offers.
        teacher: its `name` and, for each example, its `answers`: pairs of a label and a number,
            best first, as the page shows them for the model.

    Returns:
        The page's path.

    Raises:
        UserError: the int8 file is not there, or the page cannot be written.
    """
    folder = folder.resolve()
    file = folder / FORMATS["int8"].path
    if not file.exists():
        raise UserError(f"{file} is not there, which the page would run: ship the format int8 too")
    about = {"model": folder.name, "output": output, "library": LIBRARY,
             "examples": [list(texts) for texts in examples], "teacher": teacher}
    said = json.dumps(about, ensure_ascii=False).replace("<", "\\u003c")  # </script> ends a script
    page = resources.files("distilbert_jax.export").joinpath("demo.html").read_text("utf-8")
    path = folder.with_name(f"{folder.name}.html")
    try:
        path.write_text(page.replace(EMPTY, EMPTY.replace("{}", said)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path
