"""A sentence encoder as training and judgement have it: read, on the mesh, and cut to a student."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.data.sentences import tokenised
from distilbert_jax.data.tokenize import load_tokenizer, spec
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.similarity import Embedder
from distilbert_jax.jobs.task_model import cut
from distilbert_jax.machine.sharding import shardings
from distilbert_jax.models import sentence
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.sentence_modules import Dense
from distilbert_jax.models.start import init_params
from distilbert_jax.task_config import EvaluateConfig
from distilbert_jax.training.assemble import dtypes

if TYPE_CHECKING:
    import transformers

    from distilbert_jax.data.examples import Examples
    from distilbert_jax.models.family import Family


@dataclasses.dataclass(frozen=True)
class Named:
    """A sentence encoder with its tokenizer: teacher, start, or student."""

    shape: EncoderConfig
    params: dict[str, Any]
    family: "Family"
    tokenizer: "transformers.PreTrainedTokenizerFast"
    facts: sentence.SentenceModel  # prompts and the longest text

    @classmethod
    def read(cls, name: str, pooling: str = "", normalize: bool = True) -> "Named":
        """Read a folder; errors as for sentence.load and load_tokenizer."""
        found = sentence.load(name, pooling, normalize)
        model = found.model
        return cls(model.config, model.params, model.family,
                   load_tokenizer(name, model.config.vocab_size), found)

    @property
    def tokens(self) -> str:
        """What decides the ids of a text."""
        return spec(self.tokenizer).fingerprint

    @property
    def width(self) -> int:
        """Dimensions of the vectors."""
        return self.shape.sentence.width(self.shape.hidden_size)

    def reads_as(self, other: "Named") -> bool:
        """Whether both make the same tokens of every text."""
        return (self.tokens, self.facts.modules.prompt(), self.facts.max_length) == (
            other.tokens, other.facts.modules.prompt(), other.facts.max_length)

    def examples(self, texts: list[str], max_length: int | None = None, *prompts: str
                 ) -> "Examples":
        """Texts tokenised, after the first prompt of these names that there is."""
        longest = min(max_length or self.facts.max_length, self.facts.max_length)
        return tokenised(texts, self.tokenizer, longest, self.facts.modules.prompt(*prompts))


def on_devices(config: EmbedConfig | EvaluateConfig, mesh: Mesh, named: Named) -> Embedder:
    """The model with its parameters on the mesh."""
    dtype, param_dtype = dtypes(config, mesh)
    params = jax.tree.map(lambda x: np.asarray(x, param_dtype), named.params)
    return Embedder(graphdef(named.shape, dtype, param_dtype),
                    jax.device_put(params, shardings(params, mesh)), mesh,
                    named.shape.sentence.of_first)


def cut_to(named: Named, layers: list[int]) -> Named:
    """The model with some of its layers."""
    return dataclasses.replace(
        named, shape=dataclasses.replace(named.shape, num_hidden_layers=len(layers)),
        params=named.params | {"layers": cut(named.params["layers"], layers)})


def own_start(config: EmbedConfig, teacher: Named) -> Named:
    """The model that --student names, whose vectors become as wide as the teacher's.

    Without a modules.json of its own it pools as the teacher does, and reads texts with its prompts
    and no longer than it does. Where the widths differ, it is projected by a linear layer that
    begins at random.
    """
    theirs = teacher.shape.sentence
    described = Path(config.student, "modules.json").exists()
    named = Named.read(config.student, "" if described else theirs.pooling, theirs.normalize)
    if not described:
        named = _with_texts_of(teacher, named)
    found = named.shape.sentence
    if found.normalize != theirs.normalize:
        raise UserError(f"--student {config.student} and --teacher {config.teacher} differ in "
                        "Normalize: write the same in both modules.json")
    if named.width == teacher.width:
        return named
    dense = (*found.dense, Dense(named.width, teacher.width))
    shape = dataclasses.replace(named.shape, sentence=dataclasses.replace(found, dense=dense))
    random = jax.device_get(init_params(shape, config.seed))["sentence_head"]["dense"]
    own = named.params.get("sentence_head", {"dense": {}})["dense"]
    return dataclasses.replace(
        named, shape=shape, params=named.params | {"sentence_head": {"dense": random | own}})


def _with_texts_of(teacher: Named, named: Named) -> Named:
    """A model that reads texts with the teacher's prompts, and no longer than it does."""
    theirs = teacher.facts
    modules = dataclasses.replace(named.facts.modules, prompts=theirs.modules.prompts,
                                  default_prompt=theirs.modules.default_prompt)
    return dataclasses.replace(named, facts=dataclasses.replace(
        named.facts, modules=modules, max_length=min(named.facts.max_length, theirs.max_length)))
