"""The page beside a shipped folder: what it offers to try, and what a teacher answers to that."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.export import demo, predict

if TYPE_CHECKING:
    import transformers

LONGEST = 400  # characters of an example, at least up to the end of a word
ANSWERS = 5  # that are shown


def write_page(
    folder: Path, output: str, texts: Sequence[tuple[str, ...]],
    tokenizer: "transformers.PreTrainedTokenizerFast", teacher: str = "",
) -> Path:
    """Write the page.

    Args:
        folder: of the shipped model.
        output: what it answers, see Exportable.
        texts: to try, each one or two.
        tokenizer: of the model.
        teacher: Hugging Face folder; "" for none.

    Returns:
        Its path.

    Raises:
        UserError: the teacher cannot be read, or is another kind of model; or as for demo.write.
    """
    examples = [tuple(_shortened(text) for text in row) for row in texts]
    if output == "mlm":
        examples = [row for text, in examples for row in _with_mask(text, tokenizer)]
    if output == "states":  # the page compares two texts
        examples = [row for row in examples if len(row) == 2] or list(
            zip(*examples[:2], strict=True))
    known = None
    if teacher:
        answers = predict.load(teacher)
        known = {"name": Path(teacher).resolve().name,
                 "answers": [_answers(answers, output, row) for row in examples]}
    return demo.write(folder, output, examples, known)


def _shortened(text: str) -> str:
    return text[:LONGEST] + text[LONGEST:].partition(" ")[0][:LONGEST]


def _with_mask(text: str, tokenizer: "transformers.PreTrainedTokenizerFast") -> list[tuple[str]]:
    """The text with the mask in place of its middle token; [] where it has no token."""
    spans = [span for span in tokenizer(text, return_offsets_mapping=True,
                                        add_special_tokens=False)["offset_mapping"]
             if span[1] > span[0]]
    if not spans:
        return []
    begin, end = spans[len(spans) // 2]
    return [(text[:begin] + tokenizer.mask_token + text[end:],)]


def _answers(
    teacher: predict.Predictor, output: str, texts: tuple[str, ...]
) -> list[list[Any]]:
    """Pairs of a label and a number, best first, as the page shows the model's own."""
    if output == "mlm":
        found = teacher.fill_mask([texts[0]], ANSWERS)[0][0]
    elif output == "states":
        one, other = teacher.embed(texts)
        found = [("cosine", float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))]
    elif output == "tag":
        words = texts[0].split()
        found = [(f"{word}: {tag}", 1.0) for word, tag in zip(words, teacher.tag([words])[0],
                                                              strict=True)]
    else:
        answer = teacher.classify([texts if len(texts) > 1 else texts[0]])[0]
        found = [("score", answer)] if isinstance(answer, float) else sorted(
            answer.items(), key=lambda pair: -pair[1])[:ANSWERS]
    return [[label, number] for label, number in found]
