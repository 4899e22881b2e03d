"""The settings of a shipment, as config.py has those of a distillation."""

import dataclasses

from distilbert_jax.config import Config, Word, Words, check_output, option
from distilbert_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShipConfig(Config):
    """Which model is shipped, in which formats, and on which texts they are judged."""

    model: Word = option(
        "", "models", "Hugging Face folder of a masked language model, of a model for a task, or "
        "of a sentence encoder")
    evaluate: Words = option(
        (), "data", "texts on which each format is compared with the model: labelled files for a "
        "model that was trained for a task, pairs with a score or texts for a sentence encoder, "
        "texts for a masked language model; default: documentation of Python or, where the "
        "tokenizer does not know English, made-up rows", nargs="+")
    task: str = option("", "data", "a task whose files are known, as for finetune", metavar="NAME")
    text: Words = option(
        (), "data", "the column of the text, or the two columns of a pair; default: text, or "
        "sentence1 and sentence2", metavar="COLUMN", nargs="+")
    label: str = option(
        "", "data", "the column of the label; default: label or score", metavar="COLUMN")
    formats: Words = option(
        (), "output", "formats to write: onnx, int8, stablehlo, litert (default: onnx int8)",
        metavar="FORMAT", nargs="+")
    reduce_range: bool = option(
        False, "output", "int8 weights within ±63, for x86 CPUs without VNNI")
    demo: bool = option(
        False, "output", "also write a page beside the folder that runs the int8 model in a "
        "browser, by transformers.js")
    teacher: Word = option(
        "", "models", "Hugging Face folder of the model that this one was made from, whose "
        "answers to the examples stand on the page of --demo")
    output: Word = option(
        "", "output", "folder for a copy of the model with the formats in it; default: they are "
        "written into the folder of --model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("--model is missing: give the Hugging Face folder to ship")
        if self.output:
            check_output(self.output)
        if self.teacher and not self.demo:
            raise UserError(f"--teacher {self.teacher} answers on the page of --demo: add it")
        for name in ("task", "text", "label"):
            if getattr(self, name) and not self.evaluate:
                raise UserError(f"--{name} says how the files of --evaluate are read: name some")
