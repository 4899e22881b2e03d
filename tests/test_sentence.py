"""A sentence encoder's folder, read and written; and its vectors of packed rows, by definition."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_examples import examples
from test_sharding import mesh_of

from distilbert_jax.data.examples import rows_of
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.similarity import Embedder, vector_step
from distilbert_jax.export import predict
from distilbert_jax.export.sentence_folder import export_sentence
from distilbert_jax.models import bert, sentence, sentence_modules
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.sentence_modules import Dense, Sentence
from distilbert_jax.models.vectors import DENSE_ACTIVATIONS, POOLINGS, pool

LENGTHS = [9, 5, 12, 7, 3, 8]
TEXTS = ["ba be bu", "da", "ka le mu ba be na nu", "fa fe fu ga"]
WAYS = {name: Sentence(name, True) for name in POOLINGS} | {
    "unnormalised": Sentence("mean", False),
    "dense": Sentence("mean", True, (Dense(16, 10, True, "Tanh"), Dense(10, 6, False)))}


@pytest.fixture(scope="module")
def encoder(tiny_model):
    """Function (way, fields of EncoderConfig) → shape and noisy parameters in float64."""
    def build(way, **more):
        return tiny_model(num_hidden_layers=2, mlm_head=False, sentence=WAYS[way],
                          hidden_dropout=0.2, attention_dropout=0.2, **more)

    return build


def by_definition(way, states, params):
    """The vector of one text from its states [n, D]."""
    x = {"cls": lambda: states[0], "max": lambda: states.max(0),
         "mean_sqrt_len_tokens": lambda: states.sum(0) / np.sqrt(len(states))}.get(
             WAYS[way].pooling, lambda: states.mean(0))()
    for i, dense in enumerate(WAYS[way].dense):
        layer = params["sentence_head"]["dense"][i]
        x = x @ layer["kernel"] + layer.get("bias", 0)
        x = np.tanh(x) if dense.activation == "Tanh" else x
    return x / np.linalg.norm(x) if WAYS[way].normalize else x


@pytest.mark.parametrize("way", WAYS)
def test_vectors_of_packed_rows_are_those_of_each_text_alone(way, encoder, x64):
    from flax import nnx

    shape, params = encoder(way)
    found = examples(LENGTHS)
    graph = graphdef(shape, "float64", "float64")
    model = nnx.merge(graph, params)
    expected = []
    for ids, types in zip(found.ids, found.types, strict=True):
        ids, types = jnp.asarray(ids)[None], jnp.asarray(types)[None]
        states = model(ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None], types).last
        expected.append(by_definition(way, np.asarray(states)[0], params))
    step = vector_step(graph, mesh_of("1x1"), WAYS[way].of_first)
    for rows, length in (([[i] for i in range(6)], 16), ([[2, 4], [], [5, 0, 1, 3]], 40)):
        out = step(params, rows_of(found, rows, length, 5))
        for row, numbers in enumerate(rows):
            for at, number in enumerate(numbers):
                np.testing.assert_allclose(out[row, at], expected[number], rtol=0, atol=1e-12)
        assert np.isfinite(out).all()
    embedder = Embedder(graph, params, mesh_of("8x1"), WAYS[way].of_first)
    np.testing.assert_allclose(embedder(found), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_halves_are_pooled_as_singles_are(pooling):
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 300, 4)), jnp.bfloat16)
    found, expected = (pool(pooling, x, jnp.ones((1, 300), jnp.int32), 1) for x in (
        states, states.astype(jnp.float32)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def folders(toy, encoder, tmp_path_factory):
    """Function (way) → the folder of a noisy encoder, with the toy's tokenizer."""
    def write(way):
        folder = tmp_path_factory.mktemp("sentence") / way
        tokenizer = load_tokenizer(str(toy / "teacher"), None)
        shape, params = encoder(way, vocab_size=len(tokenizer))
        params = jax.tree.map(np.float32, params)
        export_sentence(folder, params, shape, bert.FAMILY, tokenizer, "A toy.\n", 7,
                        {"query": "da ", "document": ""}, "document")
        return folder, shape, params

    return write


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_read(way, folders):
    folder, shape, params = folders(way)
    found = sentence.load(str(folder))
    assert found.model.config.sentence == WAYS[way] and found.max_length == 7
    said = found.modules
    assert (said.prompt("query"), said.prompt("document"), said.prompt()) == ("da ", "", "")
    assert said.default_prompt == "document"
    jax.tree.map(np.testing.assert_array_equal, found.model.params, params)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("way", WAYS)
def test_sentence_transformers_gives_the_same_vectors(way, folders):
    """Its own padded batches and our packed rows, cut at the folder's length, with its prompts."""
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is the reference here")
    from distilbert_jax.jobs.sentence_model import Named, on_devices
    from distilbert_jax.task_config import EvaluateConfig

    folder, _, _ = folders(way)
    model = library.SentenceTransformer(str(folder), device="cpu")
    named = Named.read(str(folder))
    embed = on_devices(EvaluateConfig(model=folder, dtype="float32"), mesh_of("1x1"), named)
    scale = abs(model.encode(TEXTS)).max()
    np.testing.assert_allclose(embed(named.examples(TEXTS)), model.encode(TEXTS), rtol=0,
                               atol=1e-6 * max(1, scale))
    np.testing.assert_allclose(embed(named.examples(TEXTS, None, "query")),
                               model.encode_query(TEXTS), rtol=0, atol=1e-6 * max(1, scale))


@pytest.mark.parametrize("way", WAYS)
def test_answers_from_the_folder_are_the_same_vectors(way, folders, tmp_path):
    """predict.py pools in NumPy, so that servers need no JAX; with a prompt that is always put."""
    from distilbert_jax.jobs.sentence_model import Named, on_devices
    from distilbert_jax.task_config import EvaluateConfig

    folder = changed(folders(way)[0], tmp_path, "config_sentence_transformers.json",
                     lambda raw: raw | {"default_prompt_name": "query"})
    named = Named.read(str(folder))
    ours = on_devices(EvaluateConfig(model=folder, dtype="float32"), mesh_of("1x1"), named)(
        named.examples(TEXTS))
    np.testing.assert_allclose(predict.load(folder).embed(TEXTS), ours, rtol=0,
                               atol=1e-6 * max(1, abs(ours).max()))


def test_the_tokenizer_says_how_long_texts_are_where_nothing_else_does(folders, tmp_path):
    """As sentence-transformers 6 saves it."""
    folder = changed(folders("mean")[0], tmp_path, "tokenizer_config.json",
                     lambda raw: raw | {"model_max_length": 9})
    assert sentence.load(str(folder)).max_length == 7
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    assert sentence.load(str(folder)).max_length == 9
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    assert sentence.load(str(folder)).max_length == 24  # positions of the encoder


def test_a_prompt_that_is_empty_counts(folders, tmp_path):
    """As in encode_query and encode_document, which leave the default prompt to encode."""
    folder = changed(folders("mean")[0], tmp_path, "config_sentence_transformers.json",
                     lambda raw: raw | {"default_prompt_name": "query"})
    said = sentence.load(str(folder)).modules
    assert (said.prompt(), said.prompt("document", "query"), said.prompt("passage")) == (
        "da ", "", "")


def test_every_pooling_and_activation_has_its_function():
    assert set(POOLINGS) == set(predict.POOLINGS) == set(sentence_modules.POOLINGS)
    assert set(DENSE_ACTIVATIONS) == set(predict.ACTIVATIONS) == set(sentence_modules.ACTIVATIONS)
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    for name, function in DENSE_ACTIVATIONS.items():
        np.testing.assert_allclose(predict.ACTIVATIONS[name](x), function(x), rtol=0, atol=1e-6)


def changed(folder, tmp_path, name, change):
    """A copy of the folder with one JSON file changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / name
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(change(raw)))
    return copy


def without(kind):
    return lambda raw: [part for part in raw if not part["type"].endswith(kind)]


BAD = {
    "module": ("modules.json", lambda raw: [*raw, {"path": "4_X", "type": "my.LayerNorm"}],
               "unknown module in .*modules.json: 'LayerNorm'.*known: Dense, Normalize"),
    "order": ("modules.json", lambda raw: raw[::-1], "lists Normalize, Dense, Dense, Pooling, Tr"),
    "no pooling": ("modules.json", without("Pooling"), "lists Transformer, Dense"),
    "no list": ("modules.json", lambda raw: {"a": 1}, "modules.json cannot be read"),
    "place": ("modules.json", lambda raw: [raw[0] | {"path": "0_T"}, *raw[1:]],
              "keeps the Transformer in 0_T: move"),
    "pooling": ("1_Pooling/config.json", lambda raw: {"pooling_mode": "weightedmean"},
                "unknown pooling in .*'weightedmean'.*known: cls, max, mean"),
    "old": ("1_Pooling/config.json", lambda raw: {"pooling_mode_lasttoken": True},
            "unknown pooling in .*'lasttoken'"),
    "two": ("1_Pooling/config.json", lambda raw: {"pooling_mode": ["cls", "max"]},
            "joins cls and max: one pooling"),
    "prompt": ("1_Pooling/config.json", lambda raw: raw | {"include_prompt": False},
               "include_prompt is false"),
    "activation": ("2_Dense/config.json", lambda raw: raw | {"activation_function": "my.Swish"},
                   "unknown activation in .*'Swish'"),
    "residual": ("2_Dense/config.json", lambda raw: raw | {"use_residual": True}, "without resid"),
    "longest": ("sentence_bert_config.json", lambda raw: raw | {"max_seq_length": "128"},
                "of '128' tokens .max_seq_length .*, which is no whole number from 3"),
    "default": ("config_sentence_transformers.json", lambda raw: raw | {"default_prompt_name": "q"},
                "default_prompt_name 'q' is none of the prompts"),
    "lower": ("sentence_bert_config.json", lambda raw: raw | {"do_lower_case": True},
              "do_lower_case is not supported"),
}


@pytest.fixture(scope="module")
def dense_folder(folders):
    return folders("dense")[0]


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_refused(name, dense_folder, tmp_path):
    file, change, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        sentence.load(str(changed(dense_folder, tmp_path, file, change)))
    assert "\n" not in str(error.value)


def test_a_dense_that_does_not_fit_or_is_cut_short(dense_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dense_folder, copy)
    path = copy / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": np.zeros((10, 9), np.float32)}, path)
    with pytest.raises(UserError, match="Dense takes 9 dimensions, the pooled states have 16"):
        sentence.load(str(copy))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="missing, damaged or holds no linear.weight"):
        sentence.load(str(copy))


def test_the_pooling_is_said_once(toy, dense_folder):
    teacher = str(toy / "teacher")
    found = sentence.load(teacher, "mean").model.config
    assert found.sentence == Sentence("mean", True) and not (found.mlm_head or found.pooler)
    assert not sentence.load(teacher, "cls", False).model.config.sentence.normalize
    with pytest.raises(UserError, match="without modules.json: its states were not trained"):
        sentence.load(teacher)
    with pytest.raises(UserError, match="unknown --pooling 'middle'"):
        sentence.load(teacher, "middle")
    with pytest.raises(UserError, match="has a modules.json, .*: leave out --pooling"):
        sentence.load(str(dense_folder), "mean")


def test_an_encoder_without_modules_says_nothing_of_its_vectors(toy, folders, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(folders("mean")[0], folder)
    (folder / "modules.json").unlink()
    with pytest.raises(UserError, match="has no modules.json, .*: give --pooling mean, cls, max"):
        sentence.load(str(folder))


def test_gradients_do_not_depend_on_texts_that_are_not_there(encoder, x64):
    """A row with empty places has finite gradients, though their vectors are 0."""
    from flax import nnx

    for way in ("mean", "max"):
        shape, params = encoder(way)
        graph = graphdef(shape, "float64", "float64")
        found = examples(LENGTHS)

        def total(params, width, graph=graph, found=found):
            batch = jax.tree.map(jnp.asarray, rows_of(found, [[0, 1]], 20, width))
            model = nnx.merge(graph, params)
            last = model(batch["input_ids"], batch["segment_ids"], batch["position_ids"]).last
            out = model.vectors(last, batch["segment_ids"], width)
            return (out[:, :2] ** 3).sum() + 0 * out.sum()

        exact, wide = (jax.grad(total)(params, width) for width in (2, 6))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), exact, wide)


def test_width_of_the_vectors():
    assert [WAYS[way].width(16) for way in ("cls", "dense")] == [16, 6]
    assert dataclasses.replace(WAYS["mean"], pooling="cls").of_first
