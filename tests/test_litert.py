"""The LiteRT file: our answers in 8 bits, of every length that it has a signature for."""

import subprocess
import sys

import numpy as np
import pytest
from test_stablehlo import batch, exportable  # noqa: F401

from distilbert_jax.export import litert
from distilbert_jax.export.exportable import reference

for library in ("litert_converter", "ai_edge_quantizer", "ai_edge_litert"):
    pytest.importorskip(library, reason="LiteRT is in the extra `phone`")

LENGTHS = (8, 24)


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("output, types", [("mlm", 2), ("states", 0), ("classify", 2)])
def test_answers(output, types, exportable, tmp_path):  # noqa: F811
    """Float32 equals our model; int8 is near. Rows take the signature that holds them."""
    model = exportable(output, type_vocab_size=types)
    plain, small = tmp_path / "plain.tflite", litert.write(model, tmp_path, LENGTHS)
    plain.write_bytes(litert.converted(model, LENGTHS))
    assert small == tmp_path / "litert" / "model.tflite"
    ours, exact, rounded = reference(model), litert.LiteRtModel(plain), litert.LiteRtModel(small)
    for rows, length in ((1, 1), (2, 8), (3, 20)):
        given = batch(rows, length)
        real = slice(None) if output == "classify" else given[1].astype(bool)
        expected = ours(*given)
        assert exact(*given).shape == rounded(*given).shape == expected.shape
        np.testing.assert_allclose(exact(*given)[real], expected[real], atol=2e-5)
        assert cosine(rounded(*given)[real], expected[real]) > 0.99
    with pytest.raises(ValueError, match="25 tokens, the file takes 24"):
        rounded(*batch(1, 25))


def test_the_word_embedding_is_stored_in_8_bits(exportable, tmp_path):  # noqa: F811
    """It is two thirds of this model, and the quantiser leaves it in float32."""
    model = exportable("states", vocab_size=2000)
    size = litert.write(model, tmp_path, (8,)).stat().st_size
    assert size < len(litert.converted(model, (8,))) - 3 * 2000 * 16 + 4 * 2000 + 10_000


def test_neither_torch_nor_tensorflow(exportable, tmp_path):  # noqa: F811
    code = '''
import sys
sys.modules["torch"] = sys.modules["tensorflow"] = None
import pickle
from pathlib import Path
from distilbert_jax.export import litert
model = pickle.loads(Path(sys.argv[1]).read_bytes())
path = litert.write(model, Path(sys.argv[2]), (8,))
litert.LiteRtModel(path)
'''
    import pickle

    (tmp_path / "model").write_bytes(pickle.dumps(exportable("classify")))
    subprocess.run([sys.executable, "-c", code, tmp_path / "model", tmp_path], check=True)
