"""Whatever the documents, lengths and vocabularies: no exception, and the counts add up."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbert_jax.config import Masking, PrepareConfig
from distilbert_jax.data import batches, blocks, prepare, sources, tokenize
from distilbert_jax.errors import UserError
from distilbert_jax.models.convert import from_hf, to_hf
from distilbert_jax.models.encoder import EncoderConfig, abstract_params
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.training import labels as masking

pytest.importorskip("transformers")

few = functools.partial(settings, deadline=None, derandomize=True, database=None)
# Any text, and text of what tokenizers treat in ways of their own: spaces and line ends of many
# kinds, accents apart from their letter, control characters, Chinese, special tokens spelt out.
ODD = st.text(st.sampled_from(" \t\n\r\x1c\x85\xa0\u3000\u200b\u0301\x00\ufffdaÄß中文가Σς-.[]"))
TEXT = st.one_of(st.text(), ODD, st.lists(st.sampled_from(
    ["[MASK]", "[SEP]", "the", "cat", "  ", "ca\u0301t", "세", "번째"]), max_size=30).map(" ".join))
LEARNT_FROM = ["the cat sat on a mat; a cat!", "세 번째 문서 中文", "déjà vu Ä ß Σ ς [ ] - ."]


@pytest.fixture(scope="module")
def tokenizers():
    """Of several vocabularies; one of them knows nothing but words, by a rule of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate((*tokenize.SPECIAL_TOKENS, "the", "cat", "a"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return [*(tokenize.train_wordpiece(LEARNT_FROM, size) for size in (70, 300)),
            PreTrainedTokenizerFast(tokenizer_object=backend, **names)]


@few(max_examples=60)
@given(st.lists(TEXT, max_size=8), st.integers(0, 2))
def test_words_and_whole_documents_give_the_same_ids(tokenizers, documents, which):
    encoder = tokenize.TextEncoder(tokenize.spec(tokenizers[which]))
    assert encoder._by_words == (which < 2)  # the last one is not BERT's
    expected, sizes = encoder._whole(documents)
    ids, found = encoder(documents)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(found, sizes)


def test_real_korean_and_english_by_words(shared):
    for folder, count in (("wiki-ko-sample", 150), ("wiki-simple-en", 1000)):
        with gzip.open(shared / folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            texts = [json.loads(next(file))["text"] for _ in range(count)]
        tokenizer = tokenize.load_tokenizer(str(shared / "minilm-l6"), None)
        encoder = tokenize.TextEncoder(tokenize.spec(tokenizer))
        assert encoder._by_words
        for ours, theirs in zip(encoder(texts), encoder._whole(texts), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@few(max_examples=25)
@given(documents=st.lists(TEXT, min_size=3, max_size=30), length=st.integers(8, 40),
       which=st.integers(0, 2), block=st.integers(1, 200), share=st.floats(0.05, 0.95))
def test_a_corpus_is_prepared_or_refused_in_one_line(
        tmp_path_factory, tokenizers, documents, length, which, block, share):
    folder, tokenizer = tmp_path_factory.mktemp("any"), tokenizers[which]
    (folder / "any.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    config = PrepareConfig(corpus=(str(folder / "any.jsonl"),), valid_share=share,
                           sequence_length=length, workers=1)
    kept = [d.strip() for d in documents if d.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CHARACTERS", block)
        try:
            prepared = prepare.prepare(config, tokenizer, folder / "data")
        except UserError as error:
            assert "held-out share" in str(error) and "\n" not in str(error)
            assert [path.name for path in folder.iterdir()] == ["any.jsonl"]
            return
    spec = tokenize.spec(tokenizer)
    for part, held_out in ((prepared.train, False), (prepared.valid, True)):
        own = [d for d in kept if sources.is_held_out(d, share) == held_out]
        ids, sizes = tokenize.TextEncoder(spec)(own)
        pieces = -(-sizes // (length - 2))
        expected = np.bincount(ids, minlength=spec.size)
        expected[[spec.cls_id, spec.sep_id]] += pieces.sum()
        np.testing.assert_array_equal(part.counts, expected)
        assert part.manifest["documents"] == len(own)
        assert part.manifest["pieces"] == pieces.sum()
        assert part.manifest["characters"] == sum(map(len, own))
        batch = batches.read(part, np.arange(len(part)))
        real = batch["segment_ids"] > 0
        assert real.any(1).all() and real.sum() == part.manifest["tokens"] == expected.sum()
        np.testing.assert_array_equal(
            np.bincount(batch["input_ids"][real], minlength=spec.size), expected)


@few(max_examples=40)
@given(data=st.data(), rate=st.sampled_from([0.01, 0.15, 0.5, 1.0]))
def test_masking_any_rows(data, rate):
    """Rows may be all padding or all special tokens."""
    rows, length, size, special = 3, 12, 9, [0, 1, 2, 3, 4]
    ids = data.draw(st.lists(st.lists(st.integers(0, size - 1), min_size=length, max_size=length),
                             min_size=rows, max_size=rows))
    ends = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    counts = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size)))
    real = np.arange(length) < np.array(ends)[:, None]
    ids = np.where(real, ids, 0).astype(np.int32)
    masked = _mask(rate)(jax.random.key(data.draw(st.integers(0, 99))),
                         {"input_ids": ids, "segment_ids": real.astype(np.int32),
                          "position_ids": np.zeros_like(ids), "row": np.arange(rows),
                          "epoch": np.zeros(rows, int)},
                         masking.vocabulary(counts, special, 4))
    masked = jax.tree.map(np.asarray, masked)
    weights, positions = masked["label_weights"] > 0, masked["masked_positions"]
    eligible = real & ~np.isin(ids, special)
    wanted = np.clip(np.floor(rate * real.sum(1) + 0.5), 1, None)
    np.testing.assert_array_equal(weights.sum(1), np.minimum(wanted, eligible.sum(1)))
    restored = masked["input_ids"].copy()
    for row in range(rows):
        chosen = positions[row][weights[row]]
        assert len(set(chosen.tolist())) == len(chosen) and eligible[row][chosen].all()
        assert set(restored[row][chosen].tolist()) <= {4, 5, 6, 7, 8}
        restored[row][chosen] = masked["labels"][row][weights[row]]
    np.testing.assert_array_equal(restored, ids)


@functools.cache
def _mask(rate):
    return jax.jit(lambda key, batch, vocabulary: masking.mask_tokens(
        masking.row_keys(key, batch), jax.tree.map(jnp.asarray, batch), vocabulary,
        Masking(rate=rate)))


SHAPES = st.builds(
    lambda heads, per_head, **sizes: EncoderConfig(
        hidden_size=heads * per_head, num_attention_heads=heads, hidden_dropout=0.0,
        attention_dropout=0.0, **sizes),
    heads=st.integers(1, 3), per_head=st.integers(1, 3), vocab_size=st.integers(5, 40),
    num_hidden_layers=st.integers(1, 3), intermediate_size=st.integers(1, 7),
    max_position_embeddings=st.integers(1, 9), type_vocab_size=st.integers(1, 3))


def noise(shape):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32),
                        abstract_params(shape))


@few(max_examples=15)
@given(shape=SHAPES, name=st.sampled_from(sorted(FAMILIES)))
def test_any_shape_goes_to_hugging_face_and_back(shape, name):
    family = FAMILIES[name]
    shape = family.from_hf(family.to_hf(shape))
    params = noise(shape)
    tensors = to_hf(params, family)
    assert sum(x.size for x in tensors.values()) == sum(x.size for x in jax.tree.leaves(params))
    found, again = from_hf(tensors, family, shape)
    assert found == shape
    jax.tree.map(np.testing.assert_array_equal, again, params)


@few(max_examples=25)
@given(data=st.data(), shape=SHAPES, name=st.sampled_from(sorted(FAMILIES)))
def test_every_tensor_that_does_not_fit_is_listed(data, shape, name):
    family = FAMILIES[name]
    shape = family.from_hf(family.to_hf(shape))
    tensors = to_hf(noise(shape), family)
    body = sorted(name for name in tensors if name.startswith(family.prefix))
    problems = 0
    for name in data.draw(st.lists(st.sampled_from(body), min_size=1, max_size=5, unique=True)):
        fault = data.draw(st.sampled_from(["missing", "renamed", "shape"]))
        array = tensors.pop(name)
        if fault == "renamed":
            tensors[f"{name}.old"] = array
        elif fault == "shape":
            tensors[name] = array[None]
        problems += 2 if fault == "renamed" else 1
    with pytest.raises(UserError) as caught:
        from_hf(tensors, family, shape)
    assert str(caught.value).startswith(f"{problems} tensors do not fit: ")
    assert "\n" not in str(caught.value)
