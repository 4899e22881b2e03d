"""Hugging Face folders in and out, bit for bit; and every way in which a folder can be wrong."""

import dataclasses
import json
import os
import pickle
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from distilbert_jax.errors import UserError
from distilbert_jax.models import convert, hub
from distilbert_jax.models.encoder import ACTIVATIONS, graphdef
from distilbert_jax.models.families import FAMILIES

WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def originals(tiny_model):
    """family → (EncoderConfig, float32 params, config.json, Hugging Face tensors)."""
    def original(name):
        family = FAMILIES[name]
        pooled = "pooler" in family.tensors.values()
        config, params = tiny_model(num_hidden_layers=2, pooler=pooled, **family.fixed)
        params = jax.tree.map(np.float32, params)
        raw = {"model_type": name, "architectures": [family.architecture], **family.to_hf(config)}
        return config, params, raw, convert.to_hf(params, family)

    return {name: original(name) for name in FAMILIES}


def write(folder, raw, tensors, name="model.safetensors", save=save_file):
    (folder / "config.json").write_text(json.dumps(raw))
    save(tensors, folder / name)
    return str(folder)


def write_shards(folder, raw, tensors, name, save):
    """Every third tensor in one of three parts, and the index."""
    stem, ending = name.split(".")
    parts = [f"{stem}-0000{n}-of-00003.{ending}" for n in (1, 2, 3)]
    where = {key: parts[n % 3] for n, key in enumerate(tensors)}
    for part in parts:
        write(folder, raw, {k: v for k, v in tensors.items() if where[k] == part}, part, save)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    return str(folder)


def save_torch(tensors, path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, path)


def assert_loads(folder, config, params):
    loaded = hub.load(folder)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_exact(name, originals, tmp_path):
    config, params, raw, tensors = originals[name]
    kernel = params["layers"][1]["ffn"]["up"]["kernel"]
    assert kernel.shape == (16, 24) and all(t.flags.c_contiguous for t in tensors.values())
    assert_loads(write(tmp_path, raw, tensors), config, params)
    again = convert.to_hf(hub.load(str(tmp_path)).params, FAMILIES[name])
    assert list(again) == list(tensors)
    for key, array in tensors.items():
        np.testing.assert_array_equal(again[key], array)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_our_folder_completely(name, originals, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params, raw, tensors = originals[name]
    if config.pooler:  # a masked language model of transformers has none
        config, params, raw, tensors = _without_pooler(originals[name])
    write(tmp_path, raw, tensors)
    model, info = getattr(transformers, raw["architectures"][0]).from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = np.arange(10, 22, dtype=np.int32)[None]
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids).long()).logits.numpy()
    ours = nnx.merge(graphdef(config, jnp.float32), jax.tree.map(jnp.asarray, params))
    hidden = ours(jnp.asarray(ids), jnp.ones_like(ids), jnp.arange(12)[None]).last
    np.testing.assert_allclose(ours.mlm_logits(hidden), expected, rtol=0, atol=2e-5)
    # And back: what transformers writes is what we read.
    model.save_pretrained(tmp_path / "again")
    assert_loads(str(tmp_path / "again"), config, params)


def _without_pooler(original):
    config, params, raw, tensors = original
    params = {k: v for k, v in params.items() if k != "pooler"}
    tensors = {k: v for k, v in tensors.items() if "pooler" not in k}
    return dataclasses.replace(config, pooler=False), params, raw, tensors


def _renamed(tensors, *pairs):
    out = {}
    for name, array in tensors.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        out[name] = array
    return out


SPELLINGS = {
    "gamma and beta": lambda t, p: _renamed(
        t, (r"(_layer_norm|LayerNorm|layer_norm)\.weight", r"\1.gamma"),
        (r"(_layer_norm|LayerNorm|layer_norm)\.bias", r"\1.beta")),
    "no prefix": lambda t, p: _renamed(t, (rf"^{p}", "")),
    "position_ids": lambda t, p: t | {f"{p}embeddings.position_ids": np.arange(24)[None]},
    "position_ids, no prefix": lambda t, p: t | {"embeddings.position_ids": np.arange(24)[None]},
}
BERT_SPELLINGS = {
    "next-sentence head": lambda t: t | {"cls.seq_relationship.weight": np.ones((2, 16), "f"),
                                         "cls.seq_relationship.bias": np.ones(2, "f")},
    "tied decoder": lambda t: t | {"cls.predictions.decoder.weight": t[f"bert.{WORDS}"],
                                   "cls.predictions.decoder.bias": t["cls.predictions.bias"]},
    "decoder in place of the embedding": lambda t: _renamed(
        t, (rf"^bert\.{WORDS}", "cls.predictions.decoder.weight")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_old_spellings(name, spelling, originals, tmp_path):
    config, params, raw, tensors = originals[name]
    changed = SPELLINGS[spelling](tensors, FAMILIES[name].prefix)
    assert set(changed) != set(tensors)
    assert_loads(write(tmp_path, raw, changed), config, params)


@pytest.mark.parametrize("spelling", BERT_SPELLINGS)
def test_old_spellings_of_bert(spelling, originals, tmp_path):
    config, params, raw, tensors = originals["bert"]
    assert_loads(write(tmp_path, raw, BERT_SPELLINGS[spelling](tensors)), config, params)


def test_parts_of_bert(originals, tmp_path):
    """Without pooler, and without MLM head."""
    config, params, raw, tensors = _without_pooler(originals["bert"])
    assert_loads(write(tmp_path, raw, tensors), config, params)
    bare = {k: v for k, v in tensors.items() if not k.startswith("cls.")}
    loaded = hub.load(write(tmp_path, raw, bare))
    assert not loaded.config.mlm_head and "mlm_head" not in loaded.params


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(half, originals, tmp_path):
    from safetensors.flax import save_file as save_flax

    config, params, raw, tensors = originals["bert"]
    halves = {name: jnp.asarray(array, half) for name, array in tensors.items()}
    expected = jax.tree.map(lambda x: x.astype(half).astype(np.float32), params)
    assert_loads(write(tmp_path, raw, halves, save=save_flax), config, expected)


@pytest.mark.parametrize("name, save", [
    ("model.safetensors", save_file), ("pytorch_model.bin", save_torch)])
def test_whole_and_sharded_files(name, save, originals, tmp_path):
    config, params, raw, tensors = originals["distilbert"]
    (tmp_path / "parts").mkdir()
    assert_loads(write(tmp_path, raw, tensors, name, save), config, params)
    assert_loads(write_shards(tmp_path / "parts", raw, tensors, name, save), config, params)


def test_half_precision_of_torch(originals, tmp_path):
    torch = pytest.importorskip("torch")
    config, params, raw, tensors = originals["distilbert"]
    for dtype in (torch.float16, torch.bfloat16):
        def save(arrays, path, dtype=dtype):
            torch.save({k: torch.tensor(v).to(dtype) for k, v in arrays.items()}, path)

        expected = jax.tree.map(lambda x, d=dtype: torch.tensor(x).to(d).float().numpy(), params)
        assert_loads(write(tmp_path, raw, tensors, "pytorch_model.bin", save), config, expected)


def test_all_mismatches_in_one_error(originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    layer = "bert.encoder.layer.1."
    wrong = dict(tensors)
    wrong["bert.adapter.weight"] = np.ones((2, 5), "f")
    del wrong[layer + "intermediate.dense.weight"]
    wrong["bert.embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"]
    wrong["cls.predictions.decoder.weight"] = tensors[f"bert.{WORDS}"] + 1
    wrong[layer + "output.dense.weight"] = np.ones((24, 16), "f")
    with pytest.raises(UserError) as error:
        hub.load(write(tmp_path, raw, wrong))
    for part in (str(tmp_path), "5 tensors do not fit", "unknown bert.adapter.weight [2, 5]",
                 f"missing {layer}intermediate.dense.weight [24, 16]",
                 "duplicated bert.embeddings.LayerNorm.weight",
                 f"untied cls.predictions.decoder.weight differs from bert.{WORDS}",
                 f"{layer}output.dense.weight is [24, 16], config.json says [16, 24]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "robrta"}, "'robrta'.*known: bert, camembert, distilbert, roberta, xlm-rob"),
    ({"model_type": None}, "known: bert, camembert, distilbert"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
    ({"position_embedding_type": "relative_key"}, "absolute positions"),
    ({"is_decoder": True}, "only encoders"),
    ({"hidden_act": "mish"}, "activation.*'mish'.*known: gelu"),
    ({"num_hidden_layers": 3}, "missing bert.encoder.layer.2"),
    ({"num_hidden_layers": 1}, "unknown bert.encoder.layer.1"),
    ({"hidden_size": "wide"}, None),  # whatever the library says, with the folder
])
def test_configs_that_do_not_fit(change, message, originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    with pytest.raises(UserError, match=message) as error:
        hub.load(write(tmp_path, raw | change, tensors))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text, message", [
    (None, "does not exist"), ("{", "cannot be read"), ("[1]", "no JSON object"),
    (b"\xff\xfe", "cannot be read")])
def test_broken_config(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        hub.load(str(tmp_path))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("name, save", [
    ("model.safetensors", save_file), ("pytorch_model.bin", save_torch)])
def test_truncated_files(name, save, originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    write(tmp_path, raw, tensors, name, save)
    whole = (tmp_path / name).read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:kept])
        with pytest.raises(UserError, match=f"{name} is damaged or incomplete"):
            hub.load(str(tmp_path))


def test_a_wrong_index(originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    write_shards(tmp_path, raw, tensors, "model.safetensors", save_file)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    part = next(iter(where.values()))
    for text, message in [
            (json.dumps({"weight_map": where | {"bert.ghost": part}}),
             "names tensors that no part holds: bert.ghost"),
            (json.dumps({"weight_map": where | {"bert.ghost": "model-9.safetensors"}}),
             "model-9.safetensors is damaged or incomplete"),
            ("{}", "index.json is damaged"), ("[]", "index.json is damaged"),
            ("{", "index.json is damaged")]:
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            hub.load(str(tmp_path))


def test_folders_that_are_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name, message in [
            (str(tmp_path), "neither model.safetensors nor pytorch_model.bin"),
            (str(tmp_path / "config.json"), "is a file"),
            (str(tmp_path / "absent"), "does not exist"),
            ("nobody/absent-model", "no folder nobody/absent-model, and the hub")]:
        with pytest.raises(UserError, match=message):
            hub.load(name)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_does_not_run(originals, tmp_path):
    torch = pytest.importorskip("torch")
    _, _, raw, _ = originals["bert"]
    mark = tmp_path / "it-ran"
    for save in (lambda evil, path: path.write_bytes(pickle.dumps(evil, 2)),
                 lambda evil, path: torch.save(evil, path),
                 lambda evil, path: torch.save(
                     evil, path, _use_new_zipfile_serialization=False)):
        folder = write(tmp_path, raw, {"x": Evil(mark)}, "pytorch_model.bin", save)
        with pytest.raises(UserError, match="damaged or incomplete"):
            hub.load(folder)
        assert not mark.exists()


def test_a_fused_tensor_and_kernels_as_they_are_stored(tiny_model):
    """Queries, keys and values in one tensor: torch's [3D, D], and GPT-2's [D, 3D]."""
    names = [f"layers/{{i}}/attention/{name}" for name in ("query", "key", "value")]
    rest = {theirs: ours for theirs, ours in FAMILIES["bert"].tensors.items() if ours not in names}
    config, params = tiny_model(num_hidden_layers=2, pooler=True)
    params = jax.tree.map(np.float32, params)
    for as_stored in (False, True):
        family = dataclasses.replace(
            FAMILIES["bert"], as_stored=as_stored,
            tensors=rest | {"bert.encoder.layer.{i}.Wqkv": tuple(names)})
        tensors = convert.to_hf(params, family)
        attention = params["layers"][1]["attention"]
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
            expected = np.concatenate(
                [attention[name.rsplit("/")[-1]][leaf] for name in names], axis=-1)
            np.testing.assert_array_equal(
                tensors[f"bert.encoder.layer.1.Wqkv.{kind}"],
                expected if as_stored else expected.T)
        up = tensors["bert.encoder.layer.1.intermediate.dense.weight"]
        assert up.shape == ((16, 24) if as_stored else (24, 16))
        found, again = convert.from_hf(tensors, family, config)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, again, params)
        tensors["bert.encoder.layer.0.Wqkv.bias"] = np.zeros(47, np.float32)
        with pytest.raises(UserError, match=r"0.Wqkv.bias is \[47\], config.json says \[48\]"):
            convert.from_hf(tensors, family, config)


def test_no_name_gets_its_prefix_twice(tiny_model):
    """Not even where a name inside the prefix looks like a bare one (transformer.h in GPT-2)."""
    family = dataclasses.replace(
        FAMILIES["distilbert"], prefix="transformer.", tied={}, ignored=(), tensors={
            theirs.replace("distilbert.", "transformer."): ours
            for theirs, ours in FAMILIES["distilbert"].tensors.items()})
    config, params = tiny_model(**family.fixed)
    tensors = convert.to_hf(jax.tree.map(np.float32, params), family)
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    assert "transformer.layer.0.attention.q_lin.weight" in bare
    for names in (tensors, bare):
        _, again = convert.from_hf(names, family, config)
        jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.float32, params))


@pytest.mark.parametrize("wrap", [
    lambda n: f"module.{n}", lambda n: f"_orig_mod.{n}", lambda n: f"module._orig_mod.{n}",
    lambda n: "_fsdp_wrapped_module." + n.replace(
        ".layer.0.", ".layer.0._checkpoint_wrapped_module.")])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_names_that_wrappers_left(name, wrap, originals, tmp_path):
    config, params, raw, tensors = originals[name]
    wrapped = {wrap(key): array for key, array in tensors.items()}
    assert_loads(write(tmp_path, raw, wrapped), config, params)


def test_heads_of_other_tasks_are_left_out_with_a_line(originals, tmp_path, capsys):
    config, params, raw, tensors = originals["bert"]
    heads = {f"cls.species.{n}.weight": np.ones((2, 16), "f") for n in range(11)}
    assert_loads(write(tmp_path, raw, tensors | heads), config, params)
    said = capsys.readouterr().err
    assert "left out, heads of other tasks: cls.species.0.weight, " in said
    assert said.rstrip().endswith("and 3 more")


def test_a_long_list_is_cut(originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    few = {key: x for key, x in tensors.items() if "layer.0" not in key}
    with pytest.raises(UserError, match="16 tensors do not fit: .*; and 8 more$") as error:
        hub.load(write(tmp_path, raw, few))
    assert len(str(error.value)) < 900


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value, originals, tmp_path):
    _, _, raw, tensors = originals["bert"]
    name = "bert.encoder.layer.1.output.dense.weight"
    spoilt = tensors[name].copy()
    spoilt[3, 5] = value
    with pytest.raises(UserError, match=f"1 tensors do not fit: {name} holds NaN or infinity"):
        hub.load(write(tmp_path, raw, tensors | {name: spoilt}))


def test_an_untied_config_with_equal_tensors(originals, tmp_path):
    config, params, raw, tensors = originals["bert"]
    raw = raw | {"tie_word_embeddings": False}
    decoder = {"cls.predictions.decoder.weight": tensors[f"bert.{WORDS}"]}
    assert_loads(write(tmp_path, raw, tensors | decoder), config, params)
    decoder["cls.predictions.decoder.weight"] = decoder["cls.predictions.decoder.weight"] + 1
    with pytest.raises(UserError, match="untied cls.predictions.decoder.weight differs"):
        hub.load(write(tmp_path, raw, tensors | decoder))


@pytest.mark.parametrize("alias, name", hub.SYNONYMS.items())
def test_activations_by_another_name_compute_the_same(alias, name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 241, dtype=np.float32)
    ours = ACTIVATIONS[name](jnp.asarray(x))
    np.testing.assert_allclose(ours, ACT2FN[alias](torch.tensor(x)).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("file", ["flax_model.msgpack", "tf_model.h5"])
def test_weights_of_other_frameworks_name_the_way(file, originals, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(originals["bert"][2]))
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"holds only {file}: convert it"):
        hub.load(str(tmp_path))


def test_the_front_for_python_is_these_functions():
    from distilbert_jax import convert as front
    from distilbert_jax.export.huggingface import export
    from distilbert_jax.models import hub

    assert (front.load, front.load_task, front.export) == (hub.load, hub.load_task, export)
