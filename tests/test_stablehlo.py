"""The program in StableHLO: JAX alone runs it, on every platform, for rows of any length."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export
from test_card import files_that_name

from distilbert_jax.export import stablehlo
from distilbert_jax.export.exportable import Exportable, reference
from distilbert_jax.models import bert, distilbert

# What opens the file elsewhere: nothing of this package can be imported.
ALONE = '''
import sys
sys.modules["distilbert_jax"] = sys.modules["flax"] = None
import numpy as np
from jax import export
path, saved = sys.argv[1:]
program = export.deserialize(bytearray(open(path, "rb").read()))
given = np.load(saved)
np.save(saved, program.call(*(given[:len(program.in_avals)])))
assert not [name for name in sys.modules if name.startswith("distilbert_jax.")]
'''


def batch(rows, length, vocabulary=72):
    """Ids, mask and types; every row but the first is padded."""
    ids = np.random.default_rng(length).integers(5, vocabulary, (rows, length))
    mask = (np.arange(length) < length - 3 * np.arange(rows)[:, None]).astype(np.int64)
    return ids, mask, np.tile(np.arange(length) > 2, (rows, 1)).astype(np.int64)


@pytest.fixture
def exportable(tiny_model):
    """Function (output, fields of EncoderConfig) → an Exportable."""

    def build(output, **overrides):
        task = {} if output in ("mlm", "states") else {
            "task": output, "num_labels": 1 if output == "regress" else 3, "mlm_head": False}
        config, params = tiny_model(num_hidden_layers=2, **task | overrides)
        params = jax.tree.map(lambda x: x.astype(np.float32), params)
        return Exportable(config, params, bert.FAMILY, output)

    return build


@pytest.mark.parametrize("output", ["mlm", "states", "tag", "classify", "regress"])
def test_same_answers_as_our_model(output, exportable, tmp_path):
    model = exportable(output)
    run, ours = stablehlo.load(stablehlo.write(model, tmp_path)), reference(model)
    assert not files_that_name(tmp_path, tmp_path, Path(jax.__file__).parent)
    for rows, length in ((1, 1), (3, 24)):  # 24 are all positions
        given = batch(rows, length)
        real = given[1].astype(bool) if output in ("mlm", "states", "tag") else slice(None)
        found, expected = run(*given), ours(*given)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_jax_alone_runs_it(exportable, tmp_path):
    """In a process without this package; a DistilBERT has no token types."""
    model = dataclasses.replace(exportable("mlm", type_vocab_size=0), family=distilbert.FAMILY)
    path, saved = stablehlo.write(model, tmp_path), tmp_path / "batch.npy"
    given = batch(3, 17)
    np.save(saved, np.stack(given).astype(np.int32))
    subprocess.run([sys.executable, "-c", ALONE, path, saved], check=True, cwd=tmp_path)
    real = given[1].astype(bool)
    np.testing.assert_allclose(np.load(saved)[real], reference(model)(*given)[real], atol=1e-5)


def test_a_row_that_is_too_long_is_refused(exportable, tmp_path):
    run = stablehlo.load(stablehlo.write(exportable("mlm"), tmp_path))
    with pytest.raises(ValueError, match="rows of 25 tokens are longer than the model's positions"):
        run(*batch(1, 25))


def test_it_runs_on_every_platform(exportable, tmp_path):
    """Nothing of the machine that writes it is left: neither layouts nor its own kernels."""
    path = stablehlo.write(exportable("mlm"), tmp_path)
    program = export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu", "tpu", "cuda")
    called = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
    assert called <= {"shape_assertion"}, called
    assert [str(x) for x in program.in_avals] == ["int32[batch,length]"] * 3
