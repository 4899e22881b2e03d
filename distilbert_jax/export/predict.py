"""A trained model answers: fill-mask, classify, tag, embed, from its folder, without PyTorch.

With ONNX Runtime neither JAX nor transformers is imported: `tokenizers` makes the rows. Beside
that stands the fill-mask of a model in memory, for the report of a run.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.models.kind import labels_of, read_config, task_of
from distilbert_jax.models.sentence_modules import read_modules

if TYPE_CHECKING:
    import flax.nnx
    import tokenizers

BATCH = 16  # rows answered together, of similar lengths
LONGEST = 10**6  # tokens; a larger model_max_length means that none is known
FILES = {"onnx": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
RUNTIMES = ("jax", *FILES)
SMALLEST = 1e-12  # that a vector's length is divided by
# `models/vectors.py` has the same for JAX: states [T, D] → [D], and what follows a Dense.
POOLINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda states: states.mean(0), "cls": lambda states: states[0],
    "max": lambda states: states.max(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / math.sqrt(len(states))}
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x, "Tanh": np.tanh, "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2}

Text = str | tuple[str, str]  # a text, or a pair


def load(folder: str | Path, runtime: str = "jax") -> "Predictor":
    """Open a Hugging Face folder.

    Args:
        folder: with config.json and tokenizer.json; for "jax" with the weights, else with what
            `distilbert-jax ship` has written.
        runtime: "jax", "onnx", or "int8", which is ONNX in 8 bits.

    Raises:
        UserError: an unknown runtime, or a file is missing or cannot be read.
    """
    folder = Path(folder)
    choose(runtime, RUNTIMES, "runtime")
    raw = read_config(folder)
    if runtime == "jax":
        run, output = _in_jax(folder)
    else:
        run = _in_onnx(folder / FILES[runtime])
        output = "states" if run.output_name == "last_hidden_state" else task_of(raw) or "mlm"
    return Predictor(folder, raw, run, output)


def _in_jax(folder: Path) -> tuple[Callable[..., np.ndarray], str]:
    from distilbert_jax.export.exportable import Exportable, reference
    from distilbert_jax.models.hub import load_any

    model = Exportable.of(load_any(str(folder)))
    return reference(model), model.output


def _in_onnx(path: Path) -> Any:
    from distilbert_jax.export.onnx_runtime import OnnxModel

    if not path.exists():
        raise UserError(f"{path} does not exist: write it by distilbert-jax ship --model "
                        f"{path.parents[1]}")
    try:
        return OnnxModel(path)
    except ImportError as error:
        raise UserError(f"{path} needs onnxruntime: pip install \"distilbert_jax[serve]\""
                        ) from error
    except Exception as error:  # the library has a dozen kinds
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from error


class Predictor:
    """A model with its tokenizer, in some runtime. `output` says what it can answer.

    Texts that are longer than the model's positions are cut, but for `fill_mask`, which refuses
    them. In int8 texts that are answered together share the rounding of their activations, so an
    answer depends a little on its neighbours.
    """

    def __init__(
        self, folder: Path, raw: dict[str, Any], run: Callable[..., np.ndarray], output: str
    ) -> None:
        self.folder, self.output = folder, output
        self._raw, self._run = raw, run
        self._labels = labels_of(raw)
        self._settings = _json(folder / "tokenizer_config.json")
        self._tokenizer = _tokenizer(folder)
        known = self._settings.get("model_max_length") or LONGEST
        self._longest = int(known if known < LONGEST else raw.get("max_position_embeddings", 512))

    def fill_mask(self, texts: Sequence[str], top: int = 5) -> list[list[list[tuple[str, float]]]]:
        """The likeliest words at each mask of each text.

        Args:
            texts: with one mask token or several.
            top: how many words for each.

        Returns:
            Text → mask → (word, probability), likeliest first.

        Raises:
            UserError: another kind of model, a text without mask, or one that is too long.
        """
        self._check("mlm")
        mask = self._mask_token()
        rows = [self._tokenizer.encode(text) for text in texts]
        at = [[i for i, token in enumerate(row.ids) if token == mask] for row in rows]
        for number, (row, places) in enumerate(zip(rows, at, strict=True), 1):
            if not places:
                raise UserError(f"text {number} has no {self._tokenizer.id_to_token(mask)} to fill")
            if len(row.ids) > self._longest:
                raise UserError(f"text {number} has {len(row.ids)} tokens, the model takes "
                                f"{self._longest}: shorten it")
        return [[self._words(logits, top) for logits in answer[places]]
                for answer, places in zip(self._answers(rows), at, strict=True)]

    def classify(self, texts: Sequence[Text]) -> list[dict[str, float]] | list[float]:
        """The probability of each label, by its name; of a regression the number.

        Args:
            texts: or pairs of them.
        """
        self._check("classify", "regress")
        rows = [self._encoded(*([text] if isinstance(text, str) else text)) for text in texts]
        found = self._answers(rows)
        if self.output == "regress":
            return [float(logits[0]) for logits in found]
        return [dict(zip(self._labels, map(float, _softmax(logits)), strict=True))
                for logits in found]

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tag of each word; "O" for words that the model is too short for.

        Args:
            sentences: of words.
        """
        self._check("tag")
        rows = [self._encoded(list(words), split=True) for words in sentences]
        tagged = []
        for words, row, logits in zip(sentences, rows, self._answers(rows), strict=True):
            first: dict[int, int] = {}  # word → its first token
            for token, word in enumerate(row.word_ids):
                if word is not None:
                    first.setdefault(word, token)
            tagged.append([self._labels[int(logits[first[i]].argmax())] if i in first else "O"
                           for i in range(len(words))])
        return tagged

    def embed(
        self, texts: Sequence[str], *prompts: str, max_length: int = LONGEST
    ) -> np.ndarray:
        """A vector for each text, [n, D] float32, made as modules.json says; else the mean.

        Args:
            texts: that are embedded.
            prompts: names, as "query": the first of them for which the folder has a prompt is put
                before each text; without names its default prompt.
            max_length: tokens of the longest text, if the folder does not say fewer; what is
                longer is cut.
        """
        self._check("states")
        described = (self.folder / "modules.json").exists()
        modules = read_modules(
            self.folder, str(self.folder), "" if described else "mean", normalize=False)
        prompt, sentence = modules.prompt(*prompts), modules.sentence
        longest = min(modules.max_length or LONGEST, max_length)
        rows = [self._encoded(prompt + text, longest=longest) for text in texts]
        pooled = POOLINGS[sentence.pooling]
        found = np.array([pooled(states) for states in self._answers(rows)], np.float32)
        for dense, params in zip(sentence.dense, modules.dense, strict=True):
            found = ACTIVATIONS[dense.activation](
                found @ params["kernel"] + params.get("bias", np.float32(0)))
        if sentence.normalize:
            found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), SMALLEST)
        return found.astype(np.float32)

    def _check(self, *outputs: str) -> None:
        if self.output not in outputs:
            names = {"mlm": "fill_mask", "classify": "classify", "regress": "classify",
                     "tag": "tag", "states": "embed"}
            raise UserError(f"{self.folder} answers {names[self.output]}, not {names[outputs[0]]}")

    def _mask_token(self) -> int:
        known = self._settings.get("mask_token") or _json(
            self.folder / "special_tokens_map.json").get("mask_token")
        token = known.get("content") if isinstance(known, dict) else known
        number = self._tokenizer.token_to_id(token) if token else None
        if number is None:
            raise UserError(f"the tokenizer in {self.folder} has no mask token")
        return number

    def _encoded(
        self, *texts: str | list[str], split: bool = False, longest: int = LONGEST
    ) -> "tokenizers.Encoding":
        self._tokenizer.enable_truncation(min(longest, self._longest))
        return self._tokenizer.encode(*texts, is_pretokenized=split)

    def _answers(self, rows: "Sequence[tokenizers.Encoding]") -> list[np.ndarray]:
        """The answer to each row, without its padding."""
        found: list[np.ndarray] = [np.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        for start in range(0, len(order), BATCH):
            some = order[start:start + BATCH]
            ids, mask, types = np.zeros(
                (3, len(some), max(len(rows[number].ids) for number in some)), np.int64)
            ids[:] = self._raw.get("pad_token_id") or 0
            for row, number in enumerate(some):
                size = len(rows[number].ids)
                ids[row, :size], mask[row, :size] = rows[number].ids, 1
                types[row, :size] = rows[number].type_ids
            for number, answer in zip(some, self._run(ids, mask, types), strict=True):
                found[number] = answer[:len(rows[number].ids)] if answer.ndim == 2 else answer
        return found

    def _words(self, logits: np.ndarray, top: int) -> list[tuple[str, float]]:
        shares = _softmax(logits)
        return [(self._tokenizer.decode([int(token)]), float(shares[token]))
                for token in np.argsort(-shares, kind="stable")[:top]]


def _tokenizer(folder: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: save the tokenizer as a fast one")
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    found.no_padding()
    found.no_truncation()
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def fill_mask(
    graph: "flax.nnx.GraphDef", params: dict[str, Any], input_ids: np.ndarray, position: int,
    top: int = 3,
) -> list[tuple[int, float]]:
    """The likeliest tokens at one position, by a model in memory.

    Args:
        graph, params: the model.
        input_ids: [T] ids of one document, [MASK] at `position`.
        position: which.
        top: how many answers.

    Returns:
        (token id, probability), likeliest first.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    ids = jnp.asarray(input_ids, jnp.int32)[None]

    @jax.jit
    def answer(params: dict[str, Any]) -> list[jax.Array]:
        model = nnx.merge(graph, params)
        hidden = model(ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]).last
        return jax.lax.top_k(jax.nn.softmax(model.mlm_logits(hidden[0, position])), top)

    share, words = answer(params)
    return [(int(w), float(p)) for w, p in zip(words, share, strict=True)]
