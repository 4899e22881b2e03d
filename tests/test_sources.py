"""Sources: every kind gives the same documents, and every fault is one line that names the file."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from distilbert_jax.data import labelled, python_docs, readers, sources
from distilbert_jax.errors import UserError

TEXTS = ["First document.", "Zweites: Käse", "세 번째"]


def write(path, content: bytes):
    if path.suffix == ".zst":
        content = zstd(content)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return str(path)


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.mark.parametrize("name, content", [
    ("a.txt", "\ufeff" + "  \r\n\n".join(TEXTS)),
    ("a.txt.gz", "\n".join(TEXTS)),
    ("a.jsonl", json_lines(TEXTS).decode()),
    ("a.txt.zst", "\n".join(TEXTS)),
    ("a.jsonl.zst", json_lines(TEXTS).decode()),
    ("a.json.gz", json_lines(TEXTS, key="content").decode() + "\n" + '{"text": null}'),
])
def test_files(tmp_path, name, content):
    assert list(sources.Documents([write(tmp_path / name, content.encode())])) == TEXTS


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonlines", "a.jl.bz2", "A.Json.XZ"])
def test_json_lines_by_any_name(name, tmp_path):
    pack = {"bz2": bz2.compress, "xz": lzma.compress}.get(name.lower().split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(json_lines(TEXTS)))
    assert list(sources.Documents([str(tmp_path / name)])) == TEXTS


def test_the_field_is_decided_once(tmp_path):
    """Records without it are counted; nothing else that a record holds is taken for its text."""
    path = write(tmp_path / "a.jsonl", b'{"id": "1", "text": "one"}\n{"id": "2"}\n{"text": null}\n')
    documents = sources.Documents([path])
    assert (list(documents), documents.taken, documents.skipped) == (["one"], [1], [1])
    named = sources.Documents([path], field="id")
    assert (list(named), named.skipped) == (["1", "2"], [1])
    with pytest.raises(UserError, match="no record has the field 'body' of --text-field"):
        list(sources.Documents([path], field="body"))
    other = write(tmp_path / "b.jsonl", b'{"id": "q7"}\n{"id": "q8", "text": "x"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match="b.jsonl:3 has a field 'text', and the first record only"):
        list(sources.Documents([other]))


def test_a_folder_stands_for_the_files_in_it(tmp_path):
    (tmp_path / "[x]" / "deep").mkdir(parents=True)
    write(tmp_path / "[x]" / "deep" / "b.jsonl", json_lines(TEXTS[1:]))
    write(tmp_path / "[x]" / "a.txt", TEXTS[0].encode())
    write(tmp_path / "[x]" / ".hidden", b"nothing")
    for name in ("[x]", "[[]x]", "[x]/**/*.*"):
        assert list(sources.Documents([str(tmp_path / name)])) == TEXTS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no files"):
        sources.check([str(tmp_path / "empty")])


def test_paragraphs(tmp_path):
    path = write(tmp_path / "book.txt", b"A sentence.\nAnother one.\n\n\nA second document.\n")
    word = f"paragraphs:{path}"
    assert list(sources.Documents([word])) == ["A sentence. Another one.", "A second document."]
    assert sources.describe([word]) == sources.describe([path])
    with pytest.raises(UserError, match="no such file"):
        sources.check(["paragraphs:absent/*.txt"])


def test_parquet_strings_in_other_clothes(tmp_path):
    texts = pyarrow.array([*TEXTS, None])
    for column in (texts.dictionary_encode(), texts.cast(pyarrow.string_view())):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert list(sources.Documents([str(tmp_path / "a.parquet")])) == TEXTS
    with pytest.raises(UserError, match="no column 'body' of --text-field .columns: text"):
        list(sources.Documents([str(tmp_path / "a.parquet")], field="body"))


@pytest.mark.parametrize("name, message", [
    ("a.csv", "a table; save its column of text as JSON lines"), ("a.TSV.gz", "a table"),
    ("a.zip", "no text; unpack or convert it (known: FILE.txt"), ("a.pdf", "no text")])
def test_files_of_other_kinds_are_refused(name, message, tmp_path):
    path = write(tmp_path / name, b"id,text\n1,hello\n")
    with pytest.raises(UserError) as caught:
        sources.check([path])
    assert message in str(caught.value) and name in str(caught.value)


def test_parquet(tmp_path):
    def write(name, columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=2)
        return str(tmp_path / name)

    numbers = list(range(4))
    title = ["title"] * 4
    texts = [*TEXTS, None]
    for columns in ({"id": numbers, "text": texts, "title": title}, {"id": numbers, "body": texts},
                    {"text": pyarrow.array(texts, pyarrow.large_string())}):
        assert list(sources.Documents([write("a.parquet", columns)])) == TEXTS
    for columns in ({"title": title, "body": texts}, {"text": numbers}):
        with pytest.raises(UserError, match=f"columns: {', '.join(columns)}"):
            list(sources.Documents([write("b.parquet", columns)]))


def test_mix_keeps_its_ratio_from_the_start_until_one_is_used_up(tmp_path):
    for name, count in (("a", 70), ("b", 1000), ("c", 1000)):
        write(tmp_path / f"{name}.txt", "".join(f"{name}{i}\n" for i in range(count)).encode())
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    corpus = sources.Documents(names, (1.0, 0.5, 3.5))
    found = list(corpus)
    assert corpus.taken[0] == 70 and len(found) == sum(corpus.taken)
    assert found.index("a69") < 350 < len(found) < 355  # it ends where a71 would have been drawn
    for end in range(1, len(found) + 1):
        for name, share in (("a", 0.2), ("b", 0.1), ("c", 0.7)):
            here = [text for text in found[:end] if text[0] == name]
            assert abs(len(here) - share * end) < 1 + 1e-9
            assert here == [f"{name}{i}" for i in range(len(here))]
    together = sources.Documents(names)
    assert len(list(together)) == 2070 and together.taken == [70, 1000, 1000]


def test_glob_is_sorted_and_order_of_words_is_kept(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name.encode())
    words = [str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")]
    assert list(sources.Documents(words)) == ["c", "a", "b"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"fine\nbad \xff\n", "a.txt:2: not UTF-8 (byte 5 of the line is 0xff)"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b"[1]\n", "a.jsonl:1: not a JSON object"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: the text holds half a surrogate pair"),
    ("a.jsonl", b'{"title": "x", "body": "y"}\n', "(columns: title, body)"),
    ("a.jsonl", b'{"id": "1", "body": null}\n{"id": "2", "body": "y"}\n', "(columns: id, body)"),
    ("a.jsonl", b'{"text": 0}\n', "a.jsonl:1: no column 'text'"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl:2: 'text' is int, not text"),
    ("a.jsonl", b'{"text": ' + b"7" * 5000 + b"}", "a.jsonl:1: JSON that cannot be read: Exceeds"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: JSON that cannot be read: maximum recursion"),
    ("a.txt.xz", b"text", "a.txt.xz: damaged xz file"),
    ("a.txt.bz2", b"text", "a.txt.bz2: damaged bzip2 file"),
    ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-12], "a.txt.gz: damaged gzip file"),
    ("a.txt.gz", b"text", "a.txt.gz: damaged gzip file"),
    ("a.txt.zst", zstd(b"text " * 1000)[:-12], "a.txt.zst: damaged zstd file"),
    ("a.txt.zst", b"text", "a.txt.zst: damaged zstd file"),
    ("a.parquet", b"text", "a.parquet: cannot be read: Parquet"),
])
def test_faults_in_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(sources.Documents([str(path)]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, message", [
    ("absent.txt", "'absent.txt': no such file or folder (known: FILE.txt"),
    ("absent/*.txt", "'absent/*.txt': no such file"),
    ("python-doc", "python-docs)"),
    ("hfs:name", "unknown kind of corpus 'hfs'; did you mean hf? (known: hf, paragraphs, tfds)"),
])
def test_absent_sources_are_told_at_once(name, message):
    with pytest.raises(UserError) as caught:
        sources.Documents([name])
    assert message in str(caught.value)


@pytest.mark.parametrize("module, name, line", [
    ("tensorflow_datasets", "tfds:x",
     r'tfds:x: needs tensorflow-datasets .*: pip install "distilbert_jax\[tfds\]"'),
    ("datasets", "hf:x", r'hf:x: needs datasets .*: pip install "datasets"'),
    ("datasets", "saved", r'saved: needs datasets .*: pip install "datasets"'),
    ("pyarrow.parquet", "a.parquet", r'a\.parquet: needs pyarrow .*: pip install "pyarrow"'),
    ("pyarrow", "a.txt.zst", r'a \.zst file: needs pyarrow .*: pip install "pyarrow"')])
def test_library_not_installed(module, name, line, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    for file in ("saved/state.json", "a.parquet", "a.txt.zst", "a.csv.zst"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=line):
        next(iter(sources.Documents([name])))
    if module != "tensorflow_datasets":  # labelled data
        with pytest.raises(UserError, match=line):
            labelled.read([name.replace(".txt", ".csv")], labelled.Columns(), "train")


def test_importing_data_loads_no_library():
    code = ("import sys, distilbert_jax.data.batches, distilbert_jax.data.sources\n"
            "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'jax', 'flax', 'datasets',"
            " 'transformers', 'tokenizers'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saved_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"label": [0, 1, 2], "text": TEXTS})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "no-train"))
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(str(tmp_path / "no-text"))
    assert list(sources.Documents([str(tmp_path / "one")])) == TEXTS
    assert list(sources.Documents([str(tmp_path / "split")])) == TEXTS
    for folder, message in (("no-train", "known: test"), ("no-text", "columns: label"),
                            (".", "a table; save its column")):
        with pytest.raises(UserError, match=message):
            list(sources.Documents([str(tmp_path / folder)]))


def test_hub_name_and_config(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(sources.Documents(["hf:org/name:config"])) == TEXTS
    assert asked == [(("org/name", "config"), {"split": "train", "streaming": True})]


def test_hub_out_of_reach():
    datasets = pytest.importorskip("datasets")
    if not datasets.config.HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is not set: would ask the network")
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be read: Couldn't reach"):
        next(iter(sources.Documents(["hf:nobody/nothing"])))


def test_tfds_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"text": text}) for i, text in enumerate(TEXTS))

    TinyTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(str(tmp_path))
    assert sorted(sources.Documents(["tfds:tiny_texts"])) == sorted(TEXTS)
    with pytest.raises(UserError, match="tfds:no_such_thing: cannot be read: .*not found"):
        next(iter(sources.Documents(["tfds:no_such_thing"])))


@pytest.fixture
def short_docs(monkeypatch):
    """The beginning of the documentation of Python, which later tests read whole again."""
    monkeypatch.setattr(python_docs, "MOST_CHARACTERS", 100_000)
    readers._python_docs.cache_clear()
    yield
    readers._python_docs.cache_clear()


def test_python_docs_is_clean_and_repeatable(short_docs):
    first = list(sources.Documents(["python-docs"]))
    readers._python_docs.cache_clear()
    assert first == list(sources.Documents(["python-docs"]))
    text = " ".join(first)
    assert 90_000 < sum(map(len, first)) <= 100_000
    assert len(set(first)) == len(first)
    assert ">>>" not in text and "`" not in text
    assert sum(c.isalpha() or c == " " for c in text) > 0.9 * len(text)


def test_prose_is_kept_and_markup_dropped():
    text = '''Summary of what the function computes for its caller.

    Parameters
    ----------
    x : array_like, the input which is described at length in the next line.
        Values to be summed, given as :class:`array` or as ``list`` objects.
    >>> total = compute(x) and more of the same code, which is no prose.

    Args:
        y (int): The number of times that the sum is taken before it is returned.
    '''
    assert list(python_docs._paragraphs(text)) == [
        "Summary of what the function computes for its caller.",
        "Values to be summed, given as array or as list objects.",
        "The number of times that the sum is taken before it is returned.",
    ]


def test_held_out_by_hash():
    texts = [f"document {i}" for i in range(20_000)]
    chosen = [t for t in texts if sources.is_held_out(t, 0.1)]
    spread = (20_000 * 0.1 * 0.9) ** 0.5  # of a binomial count
    assert abs(len(chosen) - 2000) < 5 * spread
    assert all(sources.is_held_out(t, 0.2) for t in chosen)


def test_describe_knows_a_file_by_its_content(tmp_path):
    (tmp_path / "copy").mkdir()
    path = write(tmp_path / "a.txt", b"one")
    before = sources.describe([path, "python-docs", "hf:a:b"])
    assert before[0][:2] == ["a.txt", 3] and before[1:] == [["python-docs:"], ["hf:a:b"]]
    assert sources.describe([write(tmp_path / "copy" / "a.txt", b"one")]) == before[:1]
    assert sources.describe([write(tmp_path / "b.txt", b"one")]) != before[:1]
    for content in (b"three", b"two"):
        assert sources.describe([write(tmp_path / "a.txt", content)]) != before[:1]
    long = b"x" * 3 * sources.ENDS
    ends = [sources.describe([write(tmp_path / "a.txt", content)])
            for content in (long, long[:-1] + b"y", b"y" + long[1:])]
    assert ends[0] not in ends[1:] and ends[1] != ends[2]


@pytest.mark.parametrize("kind", sources.SOURCES)
def test_a_row_of_the_table_reads_or_refuses_in_one_line(kind, tmp_path, short_docs):
    """What is no document of its kind at all; python-docs is always there."""
    row = sources.SOURCES[kind]
    place = str(tmp_path / f"broken{(row.endings or ('',))[0]}")
    if row.endings:
        Path(place).write_bytes(b"\xff\xfe\x00")
    elif row.written.startswith(f"{kind}:"):
        place = f"{kind}:nobody_has_this"
    elif row.written == kind:
        assert len(next(iter(sources.Documents([kind])))) > 40
        return
    else:
        Path(place).mkdir()
    with pytest.raises(UserError) as error:
        list(sources.Documents([place]))
    assert "\n" not in str(error.value) and Path(place).name in str(error.value)


def test_a_new_source_is_a_function_and_a_row(tmp_path, monkeypatch):
    def read(path, field):
        return iter(Path(path).read_text().lower().split("!"))

    monkeypatch.setitem(sources.SOURCES, "shouted", sources.Source("FILE.loud", read, (".loud",)))
    (tmp_path / "a.loud").write_text("ONE!TWO")
    assert list(sources.Documents([str(tmp_path / "a.loud")])) == ["one", "two"]
    assert sources.describe([str(tmp_path / "a.loud")])[0][1] == 7
    with pytest.raises(UserError, match="FILE.loud"):
        sources.check(["nowhere"])


@pytest.mark.parametrize("word, said", [
    ("/home/me/my texts/a.txt", "a.txt"), ("../texts/*.gz", "*.gz"), ("a.txt", "a.txt"),
    ("gs://bucket/texts/a.txt", "a.txt"), ("paragraphs:/home/me/a.txt", "paragraphs:a.txt"),
    ("python-docs", "python-docs"), ("hf:org/name", "hf:org/name"), ("hf:name:de", "hf:name:de"),
    ("hf:org/name:de", "hf:org/name:de"), ("hf:/home:de", "hf:home:de"), ("tfds:a/b", "tfds:a/b")])
def test_what_is_published_of_a_word(word, said):
    assert sources.published(word) == said
    for quote in "'\"":
        assert sources.published_call(f"call(x={quote}{word}{quote}, y=[])") == (
            f"call(x={quote}{said}{quote}, y=[])")
    assert (sources.hub_dataset(word) or None) == {
        "hf:org/name": "org/name", "hf:name:de": "name", "hf:org/name:de": "org/name"}.get(word)


def test_what_is_published_of_a_command():
    given = ("distilbert-jax ship --model /a/b --output=../c/d --text x 'two words' "
             "--evaluate '/a b/c'")
    assert sources.published_call(given) == (
        "distilbert-jax ship --model b --output=d --text x 'two words' --evaluate 'c'")
