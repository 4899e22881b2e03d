"""The encoders compute what transformers' torch modules compute, and packing changes nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilbert_jax.kernels import dropout
from distilbert_jax.models import convert, encoder, hub
from distilbert_jax.models.encoder import ACTIVATIONS, graphdef
from distilbert_jax.models.families import FAMILIES

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
LENGTHS = [13, 7, 1, 10]


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config, dtype, params, ids, segments, positions, types=None, key=None):
    """Everything a model computes."""
    model = nnx.merge(graphdef(config, dtype, dtype), params)
    hidden = model(ids, segments, positions, types,
                   dropout_keys=None if key is None else jax.random.split(key, len(ids))).last
    return {"hidden": hidden,
            "logits": model.mlm_logits(hidden) if config.mlm_head else hidden,
            "pooled": model.pooled(hidden) if config.pooler else hidden[:, 0]}


def padded(random, vocab, lengths, width):
    """ids, segment ids, positions and token types of one document per row."""
    real = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    ids = random.integers(2, vocab, real.shape, dtype=np.int32) * real  # no family's padding
    types = random.integers(0, 2, real.shape, dtype=np.int32) * real
    return ids, real, np.broadcast_to(np.arange(width, dtype=np.int32), real.shape), types


def torch_forward(model, ids, real, types):
    import torch

    # RoBERTa counts positions by the ids that are not padding.
    ids = np.where(real, ids, model.config.pad_token_id)
    given = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(real).long()}
    if getattr(model.config, "type_vocab_size", 0):
        given["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    arrays = {"hidden": out.hidden_states[-1], "logits": out.get("logits"),
              "pooled": out.get("pooler_output")}
    return {name: array.numpy() for name, array in arrays.items() if array is not None}


def assert_same(model, config, params, dtype, lengths=LENGTHS):
    given = padded(np.random.default_rng(1), config.vocab_size, lengths, max(lengths))
    ids, real, _, types = given
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    ours = forward(config, dtype, params, *given)
    theirs = torch_forward(model.double() if dtype == "float64" else model, ids, real, types)
    for name, expected in theirs.items():
        where = real.astype(bool) if expected.ndim == 3 else slice(None)
        assert ours[name].dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ours[name])[where], expected[where], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*(f.architecture for f in FAMILIES.values()), "BertModel"])
def test_equals_torch(name, dtype, torch_model, from_torch):
    model = torch_model(name)
    with jax.enable_x64(dtype == "float64"):
        assert_same(model, *from_torch(model), dtype)


def test_roberta_s_head_has_the_exact_gelu_whatever_its_layers_have(torch_model, from_torch, x64):
    model = torch_model("RobertaForMaskedLM", hidden_act="relu")
    assert_same(model, *from_torch(model), "float64")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_torch(name, torch_model, from_torch, x64):
    """Of the sum of squares of all logits, in every parameter, the pad row of words included."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference here")
    family = FAMILIES[name]
    model = torch_model(family.architecture).double()
    config, params = from_torch(model)
    ids, real, positions, _ = padded(np.random.default_rng(1), 72, LENGTHS, max(LENGTHS))
    ids = np.where(real, ids, config.pad_token_id).astype(np.int32)

    def loss(params, ids, real, positions):
        ours = nnx.merge(graphdef(config, "float64", "float64"), params)
        logits = ours.mlm_logits(ours(ids, real, positions).last)
        return ((logits * real[..., None]) ** 2).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, ids, real, positions)
    real = torch.tensor(real).long()
    logits = model(torch.tensor(ids).long(), attention_mask=real).logits
    theirs = ((logits * real[..., None]) ** 2).sum()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-12)
    found = convert.to_hf(jax.device_get(gradients), family)
    expected = {family.tied.get(key, key): p.grad.numpy() for key, p in model.named_parameters()}
    assert set(found) == set(expected)
    largest = max(abs(gradient).max() for gradient in expected.values())
    for key, gradient in expected.items():
        np.testing.assert_allclose(
            found[key], gradient, rtol=0, atol=1e-9 * largest, err_msg=key)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_real_bert_equals_torch(dtype, shared):
    pytest.importorskip("torch", reason="PyTorch is the reference here")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM.from_pretrained(shared / "rxn-bert").eval()
    ours = hub.load(str(shared / "rxn-bert"))
    with jax.enable_x64(dtype == "float64"):
        assert_same(model, ours.config, ours.params, dtype, [60, 33])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_real_sentence_encoder_equals_torch(dtype, shared):
    pytest.importorskip("torch", reason="PyTorch is the reference here")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(shared / "minilm-l6").eval()
    ours = hub.load(str(shared / "minilm-l6"))
    assert ours.config.pooler and not ours.config.mlm_head
    with jax.enable_x64(dtype == "float64"):
        assert_same(model, ours.config, ours.params, dtype, [32, 20])


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 241, dtype=np.float32)
    given = torch.tensor(x, requires_grad=True)
    theirs = ACT2FN[name](given)
    theirs.sum().backward()
    ours, backward = jax.vjp(ACTIVATIONS[name], jnp.asarray(x))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-6)
    gradient, = backward(jnp.ones_like(ours))
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=0, atol=1e-5)


def test_gelu_in_bfloat16_is_rounded_once():
    x = jnp.linspace(-6, 6, 241).astype("bfloat16")
    for function in (encoder.gelu, jax.grad(lambda x: encoder.gelu(x).sum())):
        exact = function(x.astype("float32"))
        np.testing.assert_array_equal(function(x), exact.astype("bfloat16"))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_equal_rows_of_one_document(name, x64, tiny_model, batch_of):
    config, params = tiny_model(**FAMILIES[name].fixed)
    lengths = [[5, 6, 3], [8, 4], [14]]
    packed = batch_of(lengths, 16)
    hidden = forward(config, "float64", params, packed["input_ids"], packed["segment_ids"],
                     packed["position_ids"])["hidden"]
    for row, sizes in enumerate(lengths):
        ends = np.cumsum(sizes)
        for start, end in zip(ends - sizes, ends, strict=True):
            ids = np.zeros((1, 16), np.int32)
            ids[0, :end - start] = packed["input_ids"][row, start:end]
            alone = (np.arange(16) < end - start).astype(np.int32)[None]
            single = forward(config, "float64", params, ids, alone, np.arange(16)[None])["hidden"]
            np.testing.assert_allclose(
                hidden[row, start:end], single[0, :end - start], rtol=0, atol=1e-12)


def test_more_padding_changes_nothing(x64, tiny_model):
    config, params = tiny_model()
    random = np.random.default_rng(2)
    given = padded(random, config.vocab_size, LENGTHS, 13)
    wider = [np.pad(x, ((0, 0), (0, 7))) for x in given]
    wider[0][:, 13:] = 9  # what stands on padding means nothing
    short, long = (forward(config, "float64", params, *x)["logits"] for x in (given, wider))
    real = given[1].astype(bool)
    np.testing.assert_allclose(short[real], long[:, :13][real], rtol=0, atol=1e-12)


def test_bfloat16_is_close(tiny_model):
    config, params = tiny_model()
    params = jax.tree.map(np.float32, params)
    given = padded(np.random.default_rng(3), config.vocab_size, LENGTHS, 13)
    real = given[1].astype(bool)
    exact = np.asarray(forward(config, "float32", params, *given)["logits"])[real]
    half = forward(config, "bfloat16", params, *given)
    assert half["hidden"].dtype == jnp.bfloat16 and half["logits"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: a relative error of 2^-9 per rounding, of which a value meets dozens.
    error = np.asarray(half["logits"])[real] - exact
    assert np.sqrt(np.mean(error**2)) < 24 * 2**-9 * np.sqrt(np.mean(exact**2))


def test_dropout_needs_a_key_and_a_rate(tiny_model):
    given = padded(np.random.default_rng(4), 72, LENGTHS, 13)
    config, params = tiny_model()
    params = jax.tree.map(np.float32, params)
    still = forward(config, "float32", params, *given)["hidden"]

    def changed(**rates):
        config, _ = tiny_model(**rates)
        keys = [jax.random.key(n) for n in (0, 0, 1)]
        first, again, other = (
            forward(config, "float32", params, *given, key=k)["hidden"] for k in keys)
        np.testing.assert_array_equal(first, again)
        assert bool((first != other).any()) == bool((first != still).any())
        return bool((first != still).any())

    assert not changed()
    assert changed(attention_dropout=0.5)
    assert changed(hidden_dropout=0.5)


def test_rematerialisation_keeps_a_layer_s_input_only(tiny_model):
    ids, segments, positions = map(jnp.asarray, padded(
        np.random.default_rng(4), 72, LENGTHS, 13)[:3])
    config, params = tiny_model(num_hidden_layers=6, intermediate_size=64)
    params = jax.tree.map(np.float32, params)

    def kept(remat):
        graph = graphdef(config, jnp.float32, remat=remat)
        _, backward = jax.vjp(lambda p: nnx.merge(graph, p)(ids, segments, positions).last, params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))

    own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept(True) - own < 0.5 * (kept(False) - own)


def test_gradient_of_words_is_not_added_up_in_bfloat16():
    """A sum of 500 numbers of one sign would stand still there."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 8, 4000)
    cotangent = jnp.asarray(random.normal(1, 1, (4000, 16)), jnp.bfloat16)
    embed = encoder.Embed(8, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embed)
    found, backward = jax.vjp(lambda params: nnx.merge(graph, params)(jnp.asarray(ids)), params)
    assert found.dtype == jnp.bfloat16
    expected = np.zeros((8, 16))
    np.add.at(expected, ids, np.asarray(cotangent, np.float64))
    gradient, = jax.tree.leaves(backward(cotangent))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_what_is_dropped_is_random():
    """Of each bit half is set; neighbours, rows and keys have nothing to do with one another."""
    keys = jax.random.split(jax.random.key(5), 4)
    shape = 2, 3, 2**13
    seeds, size = dropout.dropout(0.5, keys).seeds, math.prod(shape)
    indices = jnp.arange(size, dtype=jnp.uint32)
    found = np.stack([dropout.bits(indices, *own) for own in seeds])
    ones = (found[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(float) - 0.5
    assert abs(ones.mean(1)).max() < 5 * 0.5 / size**0.5
    for far in (1, 2, 3 * 2**13):
        assert abs((ones[:, far:] * ones[:, :-far]).mean(1)).max() < 5 * 0.25 / (size - far)**0.5
    for other in range(1, 4):
        assert abs((ones[0] * ones[other]).mean(0)).max() < 5 * 0.25 / size**0.5
    assert (dropout.bits(indices, *(seeds[0] + np.uint32([0, 1]))) != found[0]).mean() > 0.99
    for rate in (0.1, 0.3):
        left = np.asarray(dropout.dropped(jnp.ones((4, *shape)), dropout.dropout(rate, keys)))
        np.testing.assert_allclose(np.unique(left), [0, 1 / (1 - rate)], rtol=1e-6)
        np.testing.assert_array_equal(left > 0, [  # by an index that is counted over all axes
            dropout.kept(indices.reshape(shape), *own, rate) for own in seeds])
        spread = (rate * (1 - rate) / left.size)**0.5
        assert abs((left == 0).mean() - rate) < 4 * spread


def test_a_row_drops_by_its_own_key(tiny_model, monkeypatch):
    """Alone it is what it is among others; no two places in the model drop alike."""
    given = [jnp.asarray(x) for x in padded(np.random.default_rng(4), 72, LENGTHS, 13)[:3]]
    config, params = tiny_model(num_hidden_layers=2, hidden_dropout=0.3, attention_dropout=0.3)
    model = nnx.merge(graphdef(config, jnp.float32), jax.tree.map(np.float32, params))
    keys, used, drop = jax.random.split(jax.random.key(0), 4), [], encoder.dropout

    def noted(rate, keys):
        used.append(jax.random.key_data(keys))
        return drop(rate, keys)

    monkeypatch.setattr(encoder, "dropout", noted)
    whole = model(*given, dropout_keys=keys).last
    places = 1 + 2 * 3  # embeddings; attention, what it puts out, feed-forward
    assert len(used) == places and len(np.unique(np.concatenate(used), axis=0)) == places * 4
    alone = model(*(x[1:2] for x in given), dropout_keys=keys[1:2]).last
    np.testing.assert_allclose(alone[:, :7], whole[1:2, :7], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("remat", [False, True])
def test_the_last_layer_at_a_few_positions_is_that_of_all(tiny_model, x64, rate, remat):
    """Its states, and the gradients of all parameters, with the same elements dropped."""
    given = [jnp.asarray(x) for x in padded(np.random.default_rng(4), 72, LENGTHS, 13)[:3]]
    config, params = tiny_model(
        num_hidden_layers=2, hidden_dropout=rate, attention_dropout=rate)
    graph = graphdef(config, jnp.float64, jnp.float64, remat=remat)
    keys = jax.random.split(jax.random.key(0), 4)
    at = jnp.asarray(np.random.default_rng(5).integers(0, 7, (4, 3)), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3, 16)))

    def few(params):
        last = nnx.merge(graph, params)(*given, dropout_keys=keys, at=at).last
        return (weights * last).sum(), last

    def whole(params):
        last = nnx.merge(graph, params)(*given, dropout_keys=keys).last
        last = jnp.take_along_axis(last, at[..., None], axis=1)
        return (weights * last).sum(), last

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *(
        jax.value_and_grad(f, has_aux=True)(params) for f in (few, whole)))


def test_only_bert_drops_after_the_attention_output(tiny_model):
    _, params = tiny_model()
    x, segments = jnp.ones((2, 5, 16)), jnp.ones((2, 5), jnp.int32)
    outputs = {}
    for drops in (True, False):
        config, _ = tiny_model(hidden_dropout=0.5, attention_output_dropout=drops)
        model = nnx.merge(graphdef(config, jnp.float32), jax.tree.map(np.float32, params))
        layer = model.layers[0]
        layer.dropout = 0.0  # after the feed-forward block, which both have
        for keys in (None, jax.random.split(jax.random.key(0), 2)):
            outputs[drops, keys is None] = layer(x, segments, keys)
    np.testing.assert_array_equal(outputs[False, False], outputs[False, True])
    assert (outputs[True, False] != outputs[True, True]).any()
    np.testing.assert_array_equal(outputs[True, True], outputs[False, True])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(name):
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    assert family.from_hf({}) == family.from_hf(
        transformers.AutoConfig.for_model(name).to_dict())
    assert family.from_hf({}).attention_output_dropout == (name != "distilbert")
