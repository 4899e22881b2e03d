"""What tests share: eight fake devices, compiled programs, the shape checker, tiny models."""

import dataclasses
import functools
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and child processes inherit the folder
    COMPILED = tempfile.TemporaryDirectory(prefix="distilbert_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The tests spend their time compiling tiny models; this takes a fifth of it (jaxlib 0.10.2).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

if find_spec("beartype"):
    import jaxtyping

    jaxtyping.install_import_hook("distilbert_jax", "beartype.beartype")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distilbert_jax.config import Masking, TrainConfig
from distilbert_jax.export.exportable import Exportable
from distilbert_jax.machine.trees import path_name
from distilbert_jax.models import bert
from distilbert_jax.models.convert import from_hf
from distilbert_jax.models.encoder import EncoderConfig, abstract_params, graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.student import student_config, student_params
from distilbert_jax.training import labels as masking
from distilbert_jax.training.labels import LABELS
from distilbert_jax.training.objective import Objective
from distilbert_jax.training.optimizer import make_optimizer
from distilbert_jax.training.train_step import init_state, make_train_step

VOCAB = 72  # divisible by 8, so that every mesh divides the word embedding
SPECIAL = [0, 1, 2, 3, 4]  # [PAD], [UNK], [CLS], [SEP], [MASK]


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and models beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data and models in {folder}")
    return folder


@pytest.fixture(autouse=True)
def compiled_programs():
    """Kept for the next test too: a benchmark stops that, as if the process were its own."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def x64():
    """float64 within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def torch_model():
    """Function (transformers class, keys of its config.json) → a tiny model, no tensor trivial."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference here")

    def build(name, seed=0, **overrides):
        import transformers  # with torch it takes seconds to import

        model_class = getattr(transformers, name)
        family = FAMILIES[model_class.config_class.model_type]
        shape = dict(
            family.fixed, vocab_size=VOCAB, hidden_size=16, num_attention_heads=4,
            num_hidden_layers=2 if name.startswith("Distil") else 3, intermediate_size=24,
            max_position_embeddings=24, hidden_dropout=0.0, attention_dropout=0.0)
        known = family.from_hf({})
        raw = family.to_hf(dataclasses.replace(known, **shape)) | overrides
        model = model_class(model_class.config_class(**raw)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
                tensor += "norm" in key.lower() and key.endswith("weight")  # scales around 1
        return model

    return build


@pytest.fixture(scope="session")
def from_torch():
    """Function (transformers model) → (EncoderConfig, params), dtypes kept."""

    def convert(model):
        family = FAMILIES[model.config.model_type]
        tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
        return from_hf(tensors, family, family.from_hf(model.config.to_dict()))

    return convert


@pytest.fixture(scope="session")
def tiny_model():
    """Function (seed, fields of EncoderConfig) → (EncoderConfig, noisy float64 params)."""

    def build(seed=0, **overrides):
        shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 24,
                 "type_vocab_size": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        config = EncoderConfig(**shape | overrides)
        random = np.random.default_rng(seed)
        return config, jax.tree_util.tree_map_with_path(
            lambda path, leaf: random.normal(path_name(path).endswith("scale"), 0.3, leaf.shape),
            abstract_params(config))

    return build


@pytest.fixture(scope="session")
def exportable(tiny_model):
    """Function (model_type, output, fields of EncoderConfig) → an Exportable, no tensor trivial."""

    def build(model_type="bert", output="states", seed=0, **shape):
        family = FAMILIES[model_type]
        task = output if output in ("classify", "regress", "tag") else ""
        offset = family.fixed.get("offset_positions", False)
        plain = {"num_hidden_layers": 2, "hidden_size": 32, "mlm_head": output == "mlm",
                 "task": task, "num_labels": {"": 0, "regress": 1}.get(task, 3),
                 "pad_token_id": int(offset), "type_vocab_size": 1 if offset else 2}
        config, params = tiny_model(seed, **plain | dict(family.fixed) | shape)
        return Exportable(config, jax.tree.map(np.float32, params), family, output)

    return build


@pytest.fixture(scope="session")
def batch_of():
    """Function (lengths of each row's documents, row length) → a batch of NumPy arrays."""

    def build(rows, length, seed=0):
        random = np.random.default_rng(seed)
        ids, segments, positions = np.zeros((3, len(rows), length), np.int32)
        for row, lengths in enumerate(rows):
            at = 0
            for number, size in enumerate(lengths, 1):
                document = random.integers(len(SPECIAL), VOCAB, size)
                document[[0, -1]] = 2, 3  # [CLS] … [SEP]
                ids[row, at:at + size] = document
                segments[row, at:at + size] = number
                positions[row, at:at + size] = np.arange(size)
                at += size
        numbers = np.arange(len(rows), dtype=np.int32)
        return {"input_ids": ids, "segment_ids": segments, "position_ids": positions,
                "row": numbers, "epoch": np.full_like(numbers, seed)}

    return build


@pytest.fixture(scope="session")
def vocabulary():
    """Counts that differ widely, as those of words do."""
    return masking.vocabulary(np.arange(VOCAB) ** 2, SPECIAL, 4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A tiny distillation in float64: packed rows, every loss, weight decay, clipping."""

    student: EncoderConfig
    teacher: EncoderConfig
    params: dict
    teacher_params: dict
    batches: list
    tx: optax.GradientTransformation
    objective: Objective

    @property
    def teachers(self):
        return {"teacher": self.teacher_params}

    def step(self, accumulate=1, mesh=None, remat=False):
        own, theirs = (
            graphdef(c, "float64", "float64", remat) for c in (self.student, self.teacher))
        return make_train_step(
            own, {"teacher": theirs}, self.tx, self.objective, masked(), accumulate, mesh)

    def state(self):
        params = {"student": self.params, "projections": {}}
        return init_state(jax.tree.map(jnp.asarray, params), self.tx, seed=0)


def masked(**rates):
    """The labels of masked-language modelling, as a step takes them."""
    return functools.partial(LABELS["mlm"], masking=Masking(**rates))


@pytest.fixture(scope="session")
def problem(tiny_model, batch_of):
    teacher, teacher_params = tiny_model(seed=1, num_hidden_layers=2)
    _, student = student_config(bert.FAMILY, teacher, 1, dropout=0.0)
    config = TrainConfig(warmup=0.5, weight_decay=0.1, clip=0.5, learning_rate=0.01)
    rows = [[9, 7], [16], [5, 5, 6], [11], [3, 12], [16], [8], [2, 14]]
    return Problem(
        student, teacher, student_params(teacher_params, [1]), teacher_params,
        [batch_of(rows, 16, seed) for seed in range(3)], make_optimizer(config, steps=4),
        Objective(weights={"ce": 5.0, "mlm": 2.0, "cos": 1.0, "mse": 0.1}))


@pytest.fixture(scope="session")
def dropping(problem):
    """The same with dropout, which is random but must not depend on how the step is cut."""
    return dataclasses.replace(problem, student=dataclasses.replace(
        problem.student, hidden_dropout=0.2, attention_dropout=0.2))


@pytest.fixture(scope="session")
def toy(tmp_path_factory, tiny_model):
    """A folder: corpus.txt, each document of which repeats one word, and teacher, a noisy BERT."""
    from distilbert_jax.data.tokenize import train_wordpiece
    from distilbert_jax.export.huggingface import export
    from distilbert_jax.models import bert

    folder = tmp_path_factory.mktemp("toy")
    words = [a + b for a in "bdfgklmn" for b in "aeu"]
    texts = [" ".join([word] * n) for word in words for n in range(4, 14)]
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    tokenizer = train_wordpiece(texts, 100)
    # An epsilon that shows, and that a DistilBERT must not take over.
    config, params = tiny_model(
        num_hidden_layers=2, vocab_size=len(tokenizer), layer_norm_eps=1e-3)
    export(folder / "teacher", params, config, bert.FAMILY, tokenizer, "A toy.\n")
    return folder
