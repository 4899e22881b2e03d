"""ONNX graphs in ONNX Runtime: our answers for every family and head, any shape; loud failure."""

import dataclasses

import jax
import numpy as np
import pytest

from distilbert_jax.errors import UserError
from distilbert_jax.export import onnx, onnx_int8
from distilbert_jax.export.exportable import Exportable, reference
from distilbert_jax.export.onnx_runtime import OnnxModel
from distilbert_jax.models import hub
from distilbert_jax.models.encoder import ACTIVATIONS
from distilbert_jax.models.families import FAMILIES

ort = pytest.importorskip("onnxruntime", reason="pip install 'distilbert_jax[serve]'")
pytest.importorskip("onnx", reason="pip install 'distilbert_jax[serve]'")
OUTPUTS = ("mlm", "classify", "regress", "tag", "states")


def rows(model, lengths, seed=0):
    """Ids, mask and types of rows of these lengths, padded to the longest."""
    random = np.random.default_rng(seed)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(2, model.config.vocab_size, mask.shape)
    types = random.integers(0, max(1, model.config.type_vocab_size), mask.shape)
    return np.where(mask, ids, model.config.pad_token_id), mask, types


def assert_equal(model, found, batch, atol):
    ours = reference(model, 4)(*batch)
    assert found.shape == ours.shape and found.dtype == np.float32
    real = batch[1] > 0 if ours.ndim == 3 else slice(None)
    np.testing.assert_allclose(found[real], ours[real], rtol=0, atol=atol)
    assert np.abs(ours[real]).max() > 1e-3  # there is something to compare


@pytest.mark.parametrize("model_type, output", [
    *((model_type, "mlm") for model_type in FAMILIES),
    *((model_type, output) for model_type in ("bert", "distilbert", "roberta")
      for output in OUTPUTS[1:])])
def test_our_answers(model_type, output, exportable, tmp_path):
    model = exportable(model_type, output)
    path = onnx.write(model, tmp_path)
    assert path == tmp_path / "onnx" / "model.onnx"
    run = OnnxModel(path)
    for lengths in ([1], [7], [15, 20, 3], [model.config.positions]):
        batch = rows(model, lengths)
        assert_equal(model, run(*batch), batch, 2e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, exportable, tmp_path):
    model = exportable("bert", "mlm", hidden_act=name)
    batch = rows(model, [9, 4])
    assert_equal(model, OnnxModel(onnx.write(model, tmp_path))(*batch), batch, 2e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("write", [onnx.write, onnx_int8.write])
def test_a_row_longer_than_the_positions_fails(write, model_type, exportable, tmp_path):
    model = exportable(model_type)
    run = OnnxModel(write(model, tmp_path))
    run(*rows(model, [model.config.positions]))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(*rows(model, [model.config.positions + 1]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_padding_changes_nothing(model_type, exportable, tmp_path):
    model = exportable(model_type)
    run = OnnxModel(onnx.write(model, tmp_path))
    ids, mask, types = rows(model, [12, 5])
    alone = run(ids[1:, :5], mask[1:, :5], types[1:, :5])[0]
    other = np.where(mask, ids, 7)
    for batch in ((ids, mask, types), (other, mask, types)):
        np.testing.assert_allclose(run(*batch)[1, :5], alone, rtol=0, atol=1e-6)
    blank = run(ids[:1], np.zeros_like(ids[:1]), types[:1])  # nothing but padding
    assert np.isfinite(blank).all()


def test_what_stands_in_the_file(exportable, tmp_path):
    import onnx as library

    for output, name, shape in (("mlm", "logits", [72]), ("classify", "logits", []),
                                ("states", "last_hidden_state", [32])):
        model = exportable("bert", output)
        file = library.load(onnx.write(model, tmp_path))
        assert (file.ir_version, file.opset_import[0].version) == (9, 20)
        assert {opset.domain for opset in file.opset_import} == {""}  # standard operators alone
        inputs = {given.name: [dim.dim_param for dim in given.type.tensor_type.shape.dim]
                  for given in file.graph.input}
        assert inputs == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"),
                                       ["batch", "sequence"])
        (out,) = file.graph.output
        dims = out.type.tensor_type.shape.dim
        assert out.name == name and [d.dim_value for d in dims if d.dim_value][-1:] == (
            shape or [3])
        sizes = [np.prod(array.dims) for array in file.graph.initializer]
        assert sizes.count(72 * 32) == 1  # the decoder is the embedding
    for kind in ("distilbert", "roberta"):
        file = library.load(onnx.write(exportable(kind), tmp_path))
        assert [given.name for given in file.graph.input] == ["input_ids", "attention_mask"]


def test_positions_of_roberta_are_those_of_transformers(torch_model, from_torch, tmp_path):
    """Padding on either side, and pad tokens within a row."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference here")
    theirs = torch_model("RobertaForMaskedLM")
    config, params = from_torch(theirs)
    model = Exportable(config, params, FAMILIES["roberta"], "mlm")
    run = OnnxModel(onnx.write(model, tmp_path))
    ids = np.array([[1, 1, 0, 7, 9, 2], [0, 5, 1, 6, 2, 1]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    real = mask > 0
    np.testing.assert_allclose(run(ids, mask, 0 * ids)[real], expected[real], rtol=0, atol=2e-5)


def test_rounding_is_within_half_a_scale_of_each_column():
    random = np.random.default_rng(0)
    weights = random.normal(size=(40, 8)) * 10.0 ** -np.arange(8)
    weights[:, 3] = 0
    for largest in (127, 63):
        values, scale = onnx_int8.rounded(weights, 0, largest)
        assert values.dtype == np.int8 and scale.shape == (1, 8)
        assert np.abs(values).max(0).tolist() == [largest if i != 3 else 0 for i in range(8)]
        assert (np.abs(values * scale - weights) <= scale * 0.5001).all()


@pytest.mark.parametrize("output", OUTPUTS)
def test_int8_is_near(output, exportable, tmp_path):
    """Within ±63, so that it holds on CPUs without VNNI too, where products of ±127 saturate."""
    model = exportable("bert", output, hidden_size=64, intermediate_size=128)
    model = dataclasses.replace(model, params=calm(model.params))
    batch = rows(model, [20, 17, 9] * 5)
    exact = reference(model)(*batch)
    real = batch[1] > 0 if exact.ndim == 3 else slice(None)
    found = OnnxModel(onnx_int8.write(model, tmp_path, True))(*batch)
    error = np.sqrt(np.mean((found - exact)[real] ** 2)) / exact[real].std()
    assert 1e-4 < error < 0.15


def calm(params):
    """Weights as training leaves them, a fifth of the noise: attention does not turn on a hair."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf / 5 if "kernel" in str(path[-1]) else leaf, params)


def test_int8_holds_each_weight_once_in_8_bits(exportable, tmp_path):
    import onnx as library
    from onnx import numpy_helper

    model = exportable("bert", "mlm")
    for reduce_range, largest in ((False, 127), (True, 63)):
        path = onnx_int8.write(model, tmp_path, reduce_range)
        assert path == tmp_path / "onnx" / "model_quantized.onnx"
        arrays = {array.name: numpy_helper.to_array(array)
                  for array in library.load(path).graph.initializer}
        whole = {name: array for name, array in arrays.items() if array.dtype == np.int8}
        assert {int(np.abs(array).max()) for name, array in whole.items()
                if name != "embeddings/position"} == {largest}
        assert np.abs(whole["embeddings/position"]).max() == 127  # which is only looked up
        kernels = [leaf.size for leaf in jax.tree.leaves(model.params) if leaf.ndim == 2]
        types = model.params["embeddings"]["token_type"]["embedding"].size
        assert sum(array.size for array in whole.values()) == sum(kernels) - types
        assert max(array.size for array in arrays.values() if array.dtype == np.float32) <= 72


def test_a_file_of_more_than_two_gigabytes_is_refused(exportable, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    with pytest.raises(UserError, match="an ONNX file holds 2 GB: ship int8"):
        onnx.write(exportable(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, atol", [("rxn-bert", 1e-4), ("minilm-l6", 1e-4)])
def test_real_models(name, atol, shared, tmp_path):
    """12 layers of a masked language model, and a sentence encoder."""
    model = Exportable.of(hub.load_any(str(shared / name)))
    run = OnnxModel(onnx.write(model, tmp_path))
    for lengths in ([128, 60], [512]):
        batch = rows(model, lengths)
        assert_equal(model, run(*batch), batch, atol)
