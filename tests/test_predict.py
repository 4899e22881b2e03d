"""Fill-mask: the likeliest words of one position, with their probabilities."""

import json
import shutil

import numpy as np
import pytest
from test_held_out import outputs

from distilbert_jax.export.predict import Predictor, fill_mask
from distilbert_jax.models.encoder import graphdef


def test_fill_mask(x64, tiny_model, batch_of):
    config, params = tiny_model()
    graph = graphdef(config, "float64", "float64")
    batch, position = batch_of([[12]], 12), 5
    batch["input_ids"][0, position] = 4
    answers = fill_mask(graph, params, batch["input_ids"][0], position, top=4)

    logits = np.asarray(outputs(graph, params, batch)[1])[0, position]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-shares)[:4]
    assert [word for word, _ in answers] == best.tolist()
    assert [share for _, share in answers] == pytest.approx(shares[best], rel=1e-12)


@pytest.fixture
def predictor(toy, tmp_path):
    """Function (output, what is said of each position, config.json) → a Predictor without a model.
    """
    def build(output, answer, **raw):
        folder = shutil.copytree(toy / "teacher", tmp_path / "model", dirs_exist_ok=True)
        path = folder / "tokenizer_config.json"
        said = json.loads(path.read_text())
        said.pop("model_max_length", None)
        path.write_text(json.dumps(said))
        return Predictor(folder, raw, lambda ids, mask, types: answer(ids), output)

    return build


def test_texts_are_cut_where_the_model_or_the_caller_says(predictor):
    places = predictor("states", lambda ids: np.broadcast_to(np.arange(
        ids.shape[1], dtype=np.float32)[:, None], (*ids.shape, 1)), max_position_embeddings=9)
    text = "ba " * 30
    for longest, tokens in (({}, 9), ({"max_length": 4}, 4), ({"max_length": 12}, 9)):
        found = places.embed([text], **longest)  # the mean of the numbers of positions
        assert found.tolist() == [[(tokens - 1) / 2]]


def test_a_tag_is_that_of_the_first_piece_and_O_beyond_the_end(predictor):
    names = {str(i): f"B-{i}" for i in range(9)} | {"9": "O"}
    tagger = predictor("tag", lambda ids: np.broadcast_to(
        np.eye(ids.shape[1], 10), (*ids.shape, 10)), id2label=names, max_position_embeddings=8)
    pieces = len(tagger._tokenizer.encode("ba-be").ids) - 2
    assert pieces > 1
    assert tagger.tag([["ba", "ba-be", "da"]]) == [["B-1", "B-2", f"B-{2 + pieces}"]]
    assert tagger.tag([["ba"] * 8]) == [[f"B-{i}" for i in range(1, 7)] + ["O", "O"]]
