"""What a family of models is: facts about its config.json and its tensors, used both ways.

A row of FAMILIES holds no code but, where its student is of another family, which one that is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from distilbert_jax.models.encoder import EncoderConfig

Rows = tuple[tuple[str, str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of FAMILIES.

    `tensors` maps modules of the file to ours, {i} being the layer; the names of their leaves
    follow from their kind. A tuple of ours is one tensor of the file that holds them side by side
    along its outputs.
    """

    model_type: str  # of config.json
    architecture: str  # the class of transformers with the language-modelling head
    prefix: str  # of the tensors; files of a bare model leave it out
    config: Rows  # (our field, key of config.json, what transformers takes where it is absent)
    fixed: Mapping[str, Any]  # our fields of which the family knows one value
    written: Mapping[str, Any]  # further keys of config.json
    tensors: Mapping[str, str | tuple[str, ...]]
    heads: Mapping[str, Mapping[str, str]]  # task → tensors of its head, as in `tensors`
    tied: Mapping[str, str]  # tensor that files may repeat → the one that it must equal
    ignored: tuple[str, ...]  # tensors that files may hold and nothing here needs
    as_stored: bool = False  # kernels lie as [in, out] in the file, not as torch's [out, in]
    predicts: str = "mlm"  # a row of LABELS
    other_student: "Callable[[EncoderConfig], tuple[Family, EncoderConfig]] | None" = None

    def from_hf(self, raw: Mapping[str, Any]) -> EncoderConfig:
        """Read a config.json."""
        return EncoderConfig(**self.fixed, **{
            ours: raw.get(theirs, default) for ours, theirs, default in self.config})

    def to_hf(self, config: EncoderConfig) -> dict[str, Any]:
        """Write the keys of a config.json that from_hf reads, and those of `written`."""
        return {theirs: getattr(config, ours) for ours, theirs, _ in self.config} | dict(
            self.written)

    def for_task(self, task: str) -> "Family":
        """This family with the head of a task instead of the language model's.

        Args:
            task: a key of `heads`; "" returns the family as it is.
        """
        if not task:
            return self
        kind = "TokenClassification" if task == "tag" else "SequenceClassification"
        pre = {ours for ours in self.heads[task].values()}
        return dataclasses.replace(
            self, architecture=self.architecture.replace("MaskedLM", kind),
            tensors={theirs: ours for theirs, ours in self.tensors.items() if ours not in pre}
            | self.heads[task])

    @property
    def bare(self) -> "Family":
        """This family as an encoder alone, without any head."""
        return dataclasses.replace(self, architecture=self.architecture.replace(
            "ForMaskedLM", "Model"))

    def student(self, config: EncoderConfig) -> "tuple[Family, EncoderConfig]":
        """Family and shape of a student that has all layers of this model."""
        return self.other_student(config) if self.other_student else (self, config)
