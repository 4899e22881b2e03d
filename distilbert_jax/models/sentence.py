"""A sentence encoder read from its folder: the model, and what its `modules.json` says."""

import dataclasses

from distilbert_jax.errors import UserError
from distilbert_jax.models import hub
from distilbert_jax.models.sentence_modules import Modules, read_modules


@dataclasses.dataclass(frozen=True)
class SentenceModel:
    """A sentence encoder."""

    model: hub.Pretrained  # its config has a `sentence`; neither pooler nor language-model head
    modules: Modules
    max_length: int  # tokens of the longest text; what is longer is cut

    @property
    def described(self) -> bool:
        """Whether a modules.json says how its vectors are made."""
        return (self.model.folder / "modules.json").exists()


def load(name: str, pooling: str = "", normalize: bool = True) -> SentenceModel:
    """Read a sentence encoder.

    Args:
        name: of a folder with modules.json, or of a hub repository.
        pooling, normalize: of an encoder without modules.json, see read_modules.

    Raises:
        UserError: as for hub.load and read_modules; or a layer does not fit.
    """
    model = hub.load(name)
    if model.config.mlm_head and not pooling and not (model.folder / "modules.json").exists():
        raise UserError(f"{name} is a masked language model without modules.json: its states were "
                        "not trained to be a text's vector; to take them so, give --pooling mean")
    modules = read_modules(model.folder, name, pooling, normalize)
    config = dataclasses.replace(
        model.config, sentence=modules.sentence, pooler=False, mlm_head=False)
    if (found := modules.sentence.dense[:1]) and found[0].inputs != config.hidden_size:
        raise UserError(f"{name}: Dense takes {found[0].inputs} dimensions, the pooled states have "
                        f"{config.hidden_size}")
    params = {key: model.params[key] for key in ("embeddings", "layers")}
    if modules.dense:
        params["sentence_head"] = {"dense": dict(enumerate(modules.dense))}
    return SentenceModel(
        dataclasses.replace(model, config=config, params=params), modules,
        min(modules.max_length or config.positions, config.positions))
