"""The exported folder: transformers reads all of it and gives our logits; whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_held_out import outputs

from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.export.huggingface import export
from distilbert_jax.models import bert, hub
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.student import student_config, student_params

TEXTS = ["ba be bu da", "fa fe", "unheard words, ba"]
# What an older transformers and a browser's library make of all folders. .ci/run installs both.
TRANSFORMERS_4 = '''
import json, sys, transformers
root, names, texts = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
found = {}
for name in names:
    folder = f"{root}/{name}/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, output_loading_info=True)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    found[name] = {
        "version": transformers.__version__, "keys": sum(map(list, info.values()), []),
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "logits": [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
                   for text in texts],
        "best": fill(f"ba {tokenizer.mask_token} bu")[0]["score"]}
print(json.dumps(found))
'''
TRANSFORMERS_JS = '''
import { createRequire } from "module";
const [modules, root, names, ...texts] = process.argv.slice(1);
const { AutoTokenizer, env } = createRequire(modules + "/")("@huggingface/transformers");
env.allowRemoteModels = false; env.localModelPath = root;
const found = {};
for (const name of names.split(" ")) {
  const tokenizer = await AutoTokenizer.from_pretrained(name + "/model");
  found[name] = texts.map(text => tokenizer.encode(text));
}
console.log(JSON.stringify(found));
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of all that is exported: FAMILY/model."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def every(toy, root):
    """Name of the family → what is exported of it; see exported."""
    return {name: exported_as(name, toy, root / name / "model") for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def exported(request, every):
    """Folder, config, params, family and tokenizer of the toy teacher or a student of it."""
    return every[request.param]


def exported_as(name, toy, folder):
    teacher, family = hub.load(str(toy / "teacher")), FAMILIES[name]
    config, params = teacher.config, teacher.params
    if name == "distilbert":
        _, config = student_config(bert.FAMILY, config, 1, dropout=0.25)
        params = student_params(params, [1])
    elif family is not teacher.family:  # the teacher's numbers, as if it were of this family
        config = dataclasses.replace(config, **family.fixed, type_vocab_size=1)
        one_type = {"embedding": params["embeddings"]["token_type"]["embedding"][:1]}
        params = params | {"embeddings": params["embeddings"] | {"token_type": one_type}}
    tokenizer = load_tokenizer(str(toy / "teacher"), config.vocab_size)
    for card in ("old", "new"):
        export(folder, params, config, family, tokenizer, card)
        (folder / f"stray-{card}").touch()
    return folder, config, params, family, tokenizer


def test_what_is_written(exported):
    folder = exported[0]
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "stray-new"}  # nothing is left of the older folder
    assert (folder / "README.md").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    # As the umask has it for any file: others may read the weights, too.
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_transformers_gives_our_logits(exported):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference here")
    import transformers

    folder, config, params, family, tokenizer = exported
    model_class = getattr(transformers, family.architecture)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        family.architecture]
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32

    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert read.model_max_length == config.positions
    batch = read(TEXTS, padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    _, logits = outputs(graphdef(config, "float32"), params, {
        "input_ids": ids, "segment_ids": mask,
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)})
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    real = mask > 0
    np.testing.assert_allclose(
        np.asarray(logits)[real], expected.numpy()[real], rtol=0, atol=2e-5)


def test_a_model_that_is_not_finite_is_not_exported(exported, tmp_path):
    _, config, params, family, tokenizer = exported
    broken = jax.tree.map(np.array, params)
    broken["embeddings"]["norm"]["bias"][3] = np.nan
    with pytest.raises(UserError, match="LayerNorm.bias of the trained model holds NaN"):
        export(tmp_path / "model", broken, config, family, tokenizer, "card")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_gives_what_the_model_takes(exported):
    """In transformers 4 the model is handed all of it; and nothing of this machine is in it."""
    import transformers

    folder, config, *_ = exported
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    assert not {"backend", "is_local", "name_or_path", "local_files_only"} & set(raw)
    assert raw["tokenizer_class"] != "TokenizersBackend"
    given = set(transformers.AutoTokenizer.from_pretrained(folder)("ba be"))
    types = {"token_type_ids"} if config.type_vocab_size > 1 else set()
    assert given == {"input_ids", "attention_mask"} | types


def test_we_read_what_we_wrote(exported):
    folder, config, params, family, tokenizer = exported
    back = hub.load(str(folder))
    assert (back.family, back.config) == (family, config)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    load_tokenizer(str(folder), config.vocab_size)


def test_an_older_folder_stays_when_the_new_one_fails(exported, tmp_path):
    _, config, params, family, tokenizer = exported
    folder = tmp_path / "model"
    export(folder, params, config, family, tokenizer, "old")
    with pytest.raises(ValueError, match="operands|broadcast|cast|convert"):
        export(folder, params | {"mlm_head": params["mlm_head"] | {"bias": np.array(["x"])}},
               config, family, tokenizer, "new")
    assert (folder / "README.md").read_text() == "old"
    assert hub.load(str(folder)).config == config
    export(folder, params, dataclasses.replace(config, pad_token_id=1), family, tokenizer, "new")
    assert hub.load(str(folder)).config.pad_token_id == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def installed(name):
    """The folder that an environment variable names, in which .ci/run has installed something."""
    if name not in os.environ:
        pytest.skip(f"{name} names no installation of it")
    return os.environ[name]


def printed(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def by_transformers_4(every, root):
    pytest.importorskip("torch", reason="PyTorch is the reference here")
    return printed(sys.executable, "-c", TRANSFORMERS_4, root, " ".join(every), *TEXTS,
                   PYTHONPATH=installed("TRANSFORMERS_4"))


@pytest.fixture(scope="module")
def by_transformers_js(every, root):
    modules = installed("TRANSFORMERS_JS")
    return printed("node", "--input-type=module", "-e", TRANSFORMERS_JS, modules, root,
                   " ".join(every), *TEXTS)


def test_transformers_4_gives_our_logits(exported, by_transformers_4):
    _, config, params, family, tokenizer = exported
    found = by_transformers_4[family.model_type]
    assert found["version"].startswith("4.5") and not found["keys"]
    assert 0 < found["best"] <= 1
    for text, ids, logits in zip(TEXTS, found["ids"], found["logits"], strict=True):
        assert ids == tokenizer(text)["input_ids"]
        rows = np.asarray(ids, np.int32)[None]
        batch = {"input_ids": rows, "segment_ids": np.ones_like(rows),
                 "position_ids": np.arange(rows.size, dtype=np.int32)[None]}
        ours = outputs(graphdef(config, "float32", "float32"), params, batch)[1][0]
        np.testing.assert_allclose(np.asarray(logits), ours, atol=2e-5)


def test_transformers_js_gives_our_ids(exported, by_transformers_js):
    family, tokenizer = exported[-2:]
    assert by_transformers_js[family.model_type] == [tokenizer(text)["input_ids"] for text in TEXTS]
