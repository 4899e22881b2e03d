"""Bad input at the command line: one line that names it, exit code 2, and nothing on the disk."""

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest

from distilbert_jax.commands import launch
from distilbert_jax.commands.main import distil, embed, evaluate, finetune, prepare, pretrain
from distilbert_jax.errors import Interrupted
from distilbert_jax.kernels import products
from distilbert_jax.recipes import recipes

pytest.importorskip("transformers")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"

TEACHER = "--teacher teacher --corpus corpus.txt --output new --steps 1 --sequence-length 16 " \
    "--batch-size 8"
BOTH = "--teacher teacher other"
SCRATCH = TEACHER.replace("--teacher teacher ", "")
ADAPT = TEACHER.replace("--teacher", "--model")
PREPARE = "--tokenizer teacher --corpus corpus.txt --output new --sequence-length 16"


@pytest.fixture
def place(toy, tmp_path, monkeypatch):
    """The working folder: teacher/ and corpus.txt; nothing else."""
    shutil.copytree(toy / "teacher", tmp_path / "teacher")
    shutil.copy(toy / "corpus.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


def once(*words):
    """The words of a command, in which a flag that comes again replaces the one before it."""
    groups, flag = {}, ""
    for word in " ".join(words).split():
        if word.startswith("--"):
            flag = word.split("=")[0]
            groups.pop(flag, None)
        groups.setdefault(flag, []).append(word)
    return sum(groups.values(), [])


def refused(command, words, capfd, last=False):
    """Run a command that must fail; what it says after "error: ", after other lines if `last`."""
    before = tree(Path())
    with pytest.raises(SystemExit) as end:
        launch.launch(command, words)
    error = capfd.readouterr().err
    assert end.value.code == 2, error
    error = error.splitlines(keepends=True)[-1] if last else error
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert tree(Path()) == before
    return error


def with_config(**changes):
    """A broken teacher: other values in its config.json."""
    def change():
        path = Path("teacher/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def with_file(name, content):
    def write():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_bytes(content)
    return write


def without(*names):
    return lambda: [Path(name).unlink() for name in names]


def with_tensors(change):
    def rewrite():
        from safetensors.numpy import load_file, save_file

        tensors = load_file("teacher/model.safetensors")
        change(tensors)
        save_file(tensors, "teacher/model.safetensors")
    return rewrite


def headless(tensors):
    for name in [name for name in tensors if name.startswith("cls.")]:
        del tensors[name]


def wrong_shapes(tensors):
    for name in ("bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"):
        tensors[name] = tensors["cls.predictions.bias"][:3].copy()


def truncated():
    path = Path("teacher/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def prepared(*words, tokenizer="teacher", change=lambda: None):
    """The folder ready/ was prepared from the corpus, with further words."""
    def make():
        prepare(once(PREPARE, "--output ready --tokenizer", tokenizer, *words))
        change()
    return make


def other_tokenizer():
    """teacher/ has two words more."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("teacher")
    tokenizer.add_tokens(["extra", "words"])
    tokenizer.save_pretrained("other")


def second(change=lambda: None, **shape):
    """other/ is a second teacher, of the same tokenizer, with these fields of its shape changed."""
    def make():
        from distilbert_jax.data.tokenize import load_tokenizer
        from distilbert_jax.export.huggingface import export
        from distilbert_jax.models import hub
        from distilbert_jax.models.start import init_params

        found = hub.load("teacher")
        config = dataclasses.replace(found.config, **shape)
        export(Path("other"), init_params(config, 0), config, found.family,
               load_tokenizer("teacher", None), "Another.\n")
        change()
    return make


def with_words_exchanged():
    """Two words of other/ have each other's number."""
    path = Path("other/tokenizer.json")
    found = json.loads(path.read_text())
    words = found["model"]["vocab"]
    first, last = sorted(words, key=words.get)[-2:]
    words[first], words[last] = words[last], words[first]
    path.write_text(json.dumps(found))


def flipped(name):
    def flip():
        whole = bytearray(Path(name).read_bytes())
        whole[-1] ^= 1
        Path(name).write_bytes(whole)
    return flip


def with_run(**settings):
    """The output holds a checkpoint of a run with these settings and today's defaults."""
    def write():
        from distilbert_jax.config import DistilConfig

        made = DistilConfig(**dict(
            teacher="teacher", corpus=("corpus.txt",), sequence_length=16, batch_size=8) | settings)
        run = json.dumps({"settings": made.meaning(), "figures": {}}).encode()
        seal = {"run.json": [len(run), hashlib.sha256(run).hexdigest()]}
        with_file("new/checkpoints/3/run.json", run)()
        with_file("new/checkpoints/3/sha256.json", json.dumps(seal).encode())()
    return write


FOLDERS = [  # (what is made or broken, further words, parts of the message)
    # the teacher
    (None, "--teacher ./nowhere", ["model folder ./nowhere does not exist"]),
    (None, "--teacher nobody/nothing", ["no folder nobody/nothing, and the hub did not give it"]),
    (None, "--teacher corpus.txt", ["corpus.txt is a file; give the folder"]),
    (without("teacher/config.json"), "", ["teacher/config.json does not exist"]),
    (with_file("teacher/config.json", b'{"model_type": '), "", ["config.json cannot be read"]),
    (with_file("teacher/config.json", b"\xff"), "", ["config.json cannot be read"]),
    (with_file("teacher/config.json", b"[]"), "", ["config.json holds no JSON object"]),
    (with_config(model_type="gpt2"), "", ["'gpt2' is not supported (known: bert, "]),
    (with_config(num_attention_heads=0), "", ["num_attention_heads 0 is not a positive"]),
    (with_config(num_attention_heads=3), "", ["3 attention heads do not divide hidden size 16"]),
    (with_config(hidden_act="mish"), "", ["'mish'", "(known: gelu, gelu_new, relu, silu)"]),
    (with_config(vocab_size=44), "", ["is [43, 16], config.json says [44, 16]"]),
    (truncated, "", ["teacher/model.safetensors is damaged or incomplete"]),
    (without("teacher/model.safetensors"), "", ["neither model.safetensors nor pytorch_model"]),
    (with_tensors(wrong_shapes), "", ["tensors do not fit", "bert.embeddings.LayerNorm.weight is "
                                      "[3], config.json says [16]", "bert.pooler.dense.weight"]),
    (with_tensors(headless), "", ["no masked-language-model head",
                                  "distilbert-jax pretrain --model teacher"]),
    # a second one
    (None, f"{BOTH[:-5]}./nowhere", ["model folder ./nowhere does not exist"]),
    (second(mlm_head=False), BOTH, ["other has no masked-language-model head to distil from"]),
    (second(vocab_size=50), BOTH, ["--teacher other knows 50 tokens, --teacher teacher 43: all "
                                   "must have one tokenizer"]),
    (second(with_words_exchanged), BOTH, ["--teacher teacher and other have different tokenizers"]),
    (second(hidden_size=24), BOTH, ["--alpha-cos compares states of equal width, and the student "
                                    "has 16, --teacher other 24: give 0"]),
    (second(hidden_size=24), f"{BOTH} --alpha-cos 0 --alpha-relation 1 --relation-heads 16",
     ["--relation-heads 16 must divide the widths: the student has 16, --teacher other 24"]),
    (second(num_hidden_layers=1), f"{BOTH} --alpha-hidden 1 --hidden-map 1:2",
     ["--hidden-map 1:2: 1:2 is not there; the student has 1 layers, --teacher other 1"]),
    (second(max_position_embeddings=12), BOTH, ["--sequence-length 16", "12 positions"]),
    (second(), f"{BOTH} --output other", ["--teacher other would be written over by --output oth"]),
    # its tokenizer
    (without("teacher/tokenizer.json", "teacher/tokenizer_config.json"), "",
     ["tokenizer in teacher"]),
    (with_file("teacher/tokenizer.json", b"{"), "", ["no tokenizer in teacher"]),
    (with_tensors(lambda tensors: (
        tensors.update({name: tensors[name][:40].copy() for name in (
            "bert.embeddings.word_embeddings.weight", "cls.predictions.bias")}),
        with_config(vocab_size=40)())), "",
     ["tokenizer in teacher has 43 tokens, the model 40"]),
    # the corpus
    (None, "--corpus absent.txt", ["'absent.txt': no such file", "known: FILE.txt"]),
    (None, "--corpus absent/*.txt", ["'absent/*.txt': no such file"]),
    (None, "--corpus wiki:foo", ["unknown kind of corpus 'wiki'", "known: hf, paragraphs, tfds"]),
    (None, "--corpus corpus.txt absent.txt", ["'absent.txt'"]),
    (None, "--valid absent.txt", ["'absent.txt': no such file"]),
    (None, "--corpus hf:nobody/nothing", ["hf:nobody/nothing: cannot be read"]),
    (None, "--corpus teacher", ["teacher/model.safetensors: no text; unpack or convert"]),
    (with_file("empty.txt", b""), "--corpus empty.txt", ["no text in empty.txt"]),
    (with_file("blank.txt", b" \n\n\t\n"), "--corpus blank.txt", ["no text in blank.txt"]),
    (with_file("blank.txt", b"\n"), "--valid blank.txt", ["no text in blank.txt"]),
    (with_file("one.txt", b"ba be\n"), "--corpus one.txt", ["held-out share of 0.02", "--valid"]),
    (with_file("latin.txt", b"fine\nK\xe4se\n"), "--corpus latin.txt",
     ["latin.txt:2: not UTF-8 (byte 2 of the line is 0xe4)"]),
    (with_file("cut.txt.gz", gzip.compress(b"ba be\n" * 999)[:-9]), "--corpus cut.txt.gz",
     ["cut.txt.gz: damaged gzip file"]),
    (with_file("a.jsonl", b'{"text": "ba"}\n{"text"\n'), "--corpus a.jsonl",
     ["a.jsonl:2: not JSON"]),
    (with_file("a.jsonl", b'{"title": "ba", "body": "be"}\n'), "--corpus a.jsonl",
     ["a.jsonl:1: no column 'text'", "columns: title, body"]),
    (with_file("cut.txt.zst", b"ba be"), "--corpus cut.txt.zst",
     ["cut.txt.zst: damaged zstd file"]),
    (with_file("a.parquet", b"PAR1"), "--corpus a.parquet", ["a.parquet: cannot be read"]),
    # prepared before
    (prepared(), "--corpus ready corpus.txt", ["--corpus ready is a prepared folder: give it al"]),
    (prepared(), "--corpus ready --valid corpus.txt", ["--valid does not go with --corpus ready"]),
    (prepared(), "--corpus ready --mix 1", ["--mix does not go with --corpus ready"]),
    (prepared(), "--corpus ready --sequence-length 24",
     ["ready was prepared with another sequence_length (16, now 24): prepare it again"]),
    (lambda: (other_tokenizer(), prepared(tokenizer="other")()), "--corpus ready",
     ["ready was prepared with another tokenizer, masking vocabulary: prepare it again"]),
    (prepared(change=without("ready/train-00000.npy")), "--corpus ready",
     ["ready/train-00000.npy is damaged (0 bytes, not ", "delete ready and prepare it again"]),
    (prepared(change=flipped("ready/train-00000.npy")), "--corpus ready",
     ["ready/train-00000.npy is damaged (its SHA-256 is not the manifest's)"]),
    (prepared(change=with_file("ready/manifest.json", b"{")), "--corpus ready",
     ["ready/manifest.json is damaged"]),
    (with_file("new/data.partial/notes.txt", b"mine"), "",
     ["new/data.partial exists and is no unfinished preparation: remove it"]),
    (with_file("u.txt", "ba be\n".encode("utf-16-le")), "--corpus u.txt", ["u.txt:1: holds NUL"]),
    (with_file("m.txt", b"ba be\r" * 20), "--corpus m.txt", ["m.txt: lines end in carriage ret"]),
    (with_file("texts/a.txt", b"ba be\n"), "--corpus texts --output texts/out",
     ["--output texts/out lies in the folder of texts texts"]),
    (with_tensors(lambda t: t.update({name: x.astype(np.int8) for name, x in t.items()})), "",
     ["is int8, of a quantised model"]),
    (with_config(tie_word_embeddings="false"), "", ["tie_word_embeddings must be true or false"]),
    (with_config(layer_norm_eps=-1.0), "", ["layer_norm_eps -1.0 is not a positive number"]),
    (with_config(pad_token_id=999), "", ["pad_token_id 999 is not a whole number from 0 below"]),
    (with_file("teacher/config.json", b"[" * 100000), "", ["config.json cannot be read"]),
    # the output
    (with_file("new/student/thesis.txt", b"mine"), "",
     ["new/student was not made by this command and would be replaced"]),
    (with_file("new/student", b"mine"), "", ["new/student was not made by this command"]),
    (lambda: shutil.copytree("teacher", "new/student"), "--teacher new/student",
     ["--teacher new/student would be written over by --output new"]),
    (with_file("new", b""), "", ["--output new", "File exists"]),
    (with_file("file", b""), "--output file/new", ["--output file/new", "Not a directory"]),
    (None, f"--output {'x' * 300}", ["--output xxx", "File name too long"]),
    (None, "--output a/b/c --corpus teacher", ["teacher/model.safetensors: no text"]),
    (with_run(seed=3, temperature=4.0), "",
     ["new holds the checkpoints of another run", "--seed was 3, is 56",
      "--temperature was 4.0, is 2.0", "choose another --output"]),
    (with_file("new/checkpoints/3/sha256.json", b'{"run.json'), "",
     ["no checkpoint in new/checkpoints is sound", "new/checkpoints/3: sha256.json is damaged",
      "remove that folder"]),
    (with_file("new/layers.json", b"[]"), "--choose greedy",
     ["new/layers.json was not made by this command: remove it"]),
    (with_file("new/data/notes.txt", b"mine"), "", ["new/data exists and is not prepared data"]),
]


@pytest.mark.parametrize("made, words, parts", FOLDERS)
def test_files_that_cannot_be(made, words, parts, place, capfd):
    if made:
        made()
    error = refused(distil, once(TEACHER, words), capfd)
    assert all(part in error for part in parts), error


FLAGS = [  # (words, parts of the message), with every file as it should be
    ("--teacher=", ["--teacher is empty"]),
    ("--teacher teacher teacher", ["--teacher teacher teacher names one twice", "a larger --tea"]),
    ("--teacher-weights 1 2", ["--teacher-weights has 2 numbers, --teacher 1 folders: give one"]),
    (f"{BOTH} --teacher-weights 1", ["--teacher-weights has 1 numbers, --teacher 2 folders"]),
    (f"{BOTH} --teacher-weights 1 0", ["--teacher-weights 1.0 0.0 must be positive", "leave out"]),
    ("--teacher-weights nan", ["--teacher-weights nan must be positive, at most 1e9"]),
    (f"{BOTH} --kept-maskings 1", ["--kept-maskings 1 keeps the states of one teacher, and "
                                   "--teacher names 2: leave it out"]),
    ("--mesh 8", ["--mesh 8 must look like 8x1"]),
    ("--mesh 0x8", ["--mesh 0x8 must look like 8x1"]),
    ("--mesh 16x1", ["--mesh 16x1 needs 16 devices, found 8", "JAX_NUM_CPU_DEVICES=16"]),
    ("--mesh 8x1 --batch-size 12", ["--batch-size 12", "12 rows", "8 devices"]),
    ("--corpus a.txt --steps 1 --output  ", ["--output: expected one argument"]),
    ("--output=", ["--output is empty"]),
    ("--temperature 1e300", ["--temperature 1e+300 must be 0.001 to 1000"]),
    ("--steps 100000000000000000000", ["--steps 100000000000000000000 must be at most 2147483647"]),
    (f"--mesh {'9' * 5000}x1", ["must look like 8x1"]),
    ("--teacher ~nosuch/x", ["~nosuch/x does not exist"]),
    (f"--teacher {'x' * 300}", ["no folder xxx"]),
    (f"--corpus {'x' * 300}", ["no such file or folder"]),
    ("--corpus /dev/null", ["/dev/null is not a regular file"]),
    ("--output teacher", ["--teacher teacher would be written over by --output teacher"]),
    ("--accumulate 4", ["--batch-size 8 in 4 micro-batches is 2 rows", "8 devices"]),
    ("--accumulate 3", ["--accumulate 3 must divide --batch-size 8"]),
    ("--accumulate 0", ["--accumulate 0 must be at least 1"]),
    ("--sequence-length 25", ["--sequence-length 25", "24 positions"]),
    ("--sequence-length 7", ["--sequence-length 7 must be at least 8"]),
    ("--sequence-length 65536", ["--sequence-length 65536 must be at most 65535"]),
    ("--workers -1", ["--workers -1 must be at least 0"]),
    ("--mix 0.5 0.5", ["--mix has 2 weights, --corpus 1 words"]),
    ("--mix 0", ["--mix 0.0 must be positive, finite"]),
    ("--mix nan", ["--mix nan must be positive, finite"]),
    ("--sequence-length long", ["--sequence-length: invalid int value: 'long'"]),
    ("--student-layers 3", ["--student-layers 3: the teacher has 2 layers"]),
    ("--student-layers 0", ["--student-layers 0: the teacher has 2 layers"]),
    ("--student-layers 0,2", ["--student-layers 0,2: the teacher has 2 layers, 0 to 1"]),
    ("--student-layers 1,1", ["--student-layers 1,1 names a layer twice"]),
    ("--student-layers half", ["--student-layers half must be a number or a list"]),
    ("--optimizer mouon", ["unknown --optimizer 'mouon'; did you mean muon? (known: adamw, muon)"]),
    ("--mask-rate 1", ["--mask-rate 1.0 must lie between 0 and 1"]),
    ("--choose best", ["unknown --choose 'best'", "even, greedy"]),
    ("--choose greedy --student-layers 0,1", ["--student-layers 0,1 names the layers: leave out "
                                              "--choose"]),
    ("--choose greedy --init random", ["--choose greedy keeps layers of the teacher, --init"]),
    ("--choose greedy --student-layers 3", ["--student-layers 3: the teacher has 2 layers"]),
    ("--steps 0", ["--steps 0 must be at least 1"]),
    ("--steps 1.5", ["--steps: invalid int value: '1.5'"]),
    ("--batch-size 0", ["--batch-size 0 must be at least 1"]),
    ("--learning-rate -1", ["--learning-rate -1.0 must be positive"]),
    ("--learning-rate nan", ["--learning-rate nan must be positive, finite"]),
    ("--learning-rate inf", ["--learning-rate inf must be positive, finite"]),
    ("--weight-decay -0.1", ["--weight-decay -0.1 must be 0 or a positive, finite number"]),
    ("--clip 0", ["--clip 0.0 must be positive"]),
    ("--temperature 0", ["--temperature 0.0 must be positive"]),
    ("--temperature nan", ["--temperature nan must be positive"]),
    ("--alpha-ce -1", ["--alpha-ce -1.0 must be 0 or a positive, finite number"]),
    ("--alpha-cos nan", ["--alpha-cos nan must be 0 or a positive, finite number"]),
    ("--alpha-ce 0 --alpha-mlm 0 --alpha-cos 0", ["all loss weights are 0"]),
    ("--warmup 1", ["--warmup 1.0 must be in [0, 1)"]),
    ("--dropout 1", ["--dropout 1.0 must be in [0, 1)"]),
    ("--dropout nan", ["--dropout nan must be in [0, 1)"]),
    ("--valid-share 0", ["--valid-share 0.0 must lie between 0 and 1"]),
    ("--valid-share 1", ["--valid-share 1.0 must lie between 0 and 1"]),
    ("--save-every 0", ["--save-every 0 must be at least 1"]),
    ("--eval-every 0", ["--eval-every 0 must be at least 1"]),
    ("--seed -1", ["--seed -1 must be at least 0"]),
    ("--seed 4294967296", ["--seed 4294967296 must be at most 4294967295"]),
    ("--on-save-error go", ["unknown --on-save-error 'go'", "continue, stop"]),
    ("--keep 0", ["--keep 0 must be at least 1"]),
    ("--relation-heads -1", ["--relation-heads -1 must be 0 or more"]),
    ("--max-skipped 0", ["--max-skipped 0 must be at least 1"]),
    ("--output s3://bucket/run", ["--output s3://bucket/run must be a folder of this machine, or"
                                  " look like gs://bucket/name"]),
    ("--output gs://bucket", ["--output gs://bucket must be a folder of this machine, or look"]),
    ("--corpus s3://bucket/a.txt", ["unknown kind of corpus 's3'", "known: hf, paragraphs, tfds"]),
    ("--dtype float16", ["unknown --dtype 'float16'", "bfloat16"]),
    ("--init teachr", ["unknown --init 'teachr'; did you mean teacher?"]),
    ("--recipe rxn-bert", ["unknown --recipe 'rxn-bert'; did you mean rxn_bert?", "quickstart"]),
    ("--learning_rate 1", ["unknown flag '--learning_rate'; did you mean --learning-rate?"]),
    ("--steps", ["--steps: expected one argument"]),
    ("--corpus", ["--corpus: expected at least one argument"]),
    ("--steps 1 stray", ["unrecognized arguments: stray"]),
    ("--teacher=", ["--teacher is empty"]),
]


@pytest.mark.parametrize("words, parts", FLAGS)
def test_flags_that_cannot_be(words, parts, place, capfd):
    error = refused(distil, once(TEACHER, words), capfd)
    assert all(part in error for part in parts), error


LABELLED = with_file("a.csv", b"text,label\n" + b"ba,x\nbe,y\n" * 21)
TASK = "--model teacher --train a.csv --dev a.csv --output new --batch-size 8 --steps 1"


def with_classifier(change=lambda tensors: None, **config):
    """The teacher was trained to choose between x and y."""
    def make():
        LABELLED()
        with_config(architectures=["BertForSequenceClassification"],
                    id2label={"0": "x", "1": "y"}, **config)()

        def more(tensors):
            headless(tensors)
            width = tensors["bert.embeddings.LayerNorm.weight"].size
            tensors["classifier.weight"] = np.ones((2, width), np.float32)
            tensors["classifier.bias"] = np.zeros(2, np.float32)
            tensors["bert.pooler.dense.weight"] = np.ones((width, width), np.float32)
            tensors["bert.pooler.dense.bias"] = np.zeros(width, np.float32)
            change(tensors)
        with_tensors(more)()
    return make


TASKS_THAT_CANNOT = [  # (program, what is made, words after those of TASK, parts of the message)
    (finetune, LABELLED, "--model=", ["--model is missing"]),
    (finetune, LABELLED, "--model nowhere/x/y", ["model folder nowhere/x/y does not exist"]),
    (finetune, LABELLED, "--task mrcp", ["unknown --task 'mrcp'; did you mean mrpc?"]),
    (finetune, LABELLED, "--data .", ["--data . is the folder of a task: name it by --task"]),
    (finetune, LABELLED, "--task mrpc --data absent", ["--data absent is not a folder"]),
    (finetune, LABELLED, "--train absent.csv", ["absent.csv: no such file"]),
    (finetune, LABELLED, "--text body", ["a.csv:2: no column body of --text", "text, label"]),
    (finetune, LABELLED, "--label class", ["a.csv:2: no column class"]),
    (finetune, LABELLED, "--text a b c", ["--text", "must be one column or two"]),
    (finetune, LABELLED, "--kind span", ["unknown --kind 'span'", "classify, regress, tag"]),
    (finetune, LABELLED, "--kind regress", ["label 'x' is not a finite number"]),
    (finetune, LABELLED, "--max-length 25", ["--max-length 25 is beyond the model's 24 pos"]),
    (finetune, LABELLED, "--max-length 4", ["--max-length 4 must be at least 8"]),
    (finetune, LABELLED, "--batch-size 64", ["--batch-size 64 is more than the 42 examples"]),
    (finetune, LABELLED, "--epochs 0", ["--epochs 0.0 must be positive"]),
    (finetune, LABELLED, "--seeds 0", ["--seeds 0 must be at least 1"]),
    (finetune, LABELLED, "--temperature 0", ["--temperature 0.0 must be positive"]),
    (finetune, LABELLED, "--learning-rate 0", ["--learning-rate 0.0 must be positive"]),
    (finetune, LABELLED, "--alpha-hard 0 --alpha-soft 0", ["all loss weights are 0"]),
    (finetune, LABELLED, "--alpha-ce 1", ["unknown flag '--alpha-ce'"]),
    (finetune, LABELLED, "--unlabelled a.csv", ["--unlabelled needs a teacher"]),
    (finetune, LABELLED, "--hidden-map 1:1", ["--hidden-map needs a teacher"]),
    (finetune, LABELLED, "--teacher teacher", ["teacher is BertForMaskedLM, not trained"]),
    (finetune, lambda: (with_classifier()(), with_file("a.conll", b"ba x\nbe y\n\n" * 21)()),
     "--teacher teacher --train a.conll --dev a.conll", [
         "--teacher teacher was trained with --kind classify, and the labels of --train are read "
         "as --kind tag: give --kind classify if they are of that kind, or another --teacher"]),
    (finetune, LABELLED, "--distil --teacher t", ["--distil trains its own teacher"]),
    (finetune, LABELLED, "--distil --student-layers 3", ["--student-layers 3: the teacher has 2"]),
    (finetune, LABELLED, "--mesh 3x1", ["--mesh 3x1 needs 3 devices, found 8"]),
    (finetune, LABELLED, "--output gs://bucket/run", ["writes to a folder of this machine"]),
    (finetune, with_classifier(lambda t: t.pop("classifier.weight")), "--teacher teacher",
     ["missing classifier.weight [2, 16]"]),
    (finetune, with_classifier(problem_type="multi_label_classification"), "--teacher teacher",
     ["gives each text several labels"]),
    (finetune, lambda: (with_classifier()(), with_file("a.csv", b"text,label\nba,1\nbe,2\n" * 9)(
        )), "--teacher teacher", ["labels of the model are x, y, those of the data 1, 2"]),
    (finetune, lambda: (with_classifier()(), other_tokenizer(), shutil.copy(
        "teacher/config.json", "other"), shutil.copy("teacher/model.safetensors", "other")),
     "--teacher other", ["tokenizer"]),
    (finetune, LABELLED, "--distil --choose best", ["--choose", "even, greedy"]),
    (finetune, LABELLED, "--student-layers 1 --choose greedy", ["--choose greedy keeps layers of"]),
    (finetune, LABELLED, "--distil --student-layers 1, --choose greedy", ["leave out --choose"]),
    (finetune, LABELLED, "--augment 2", ["--augment needs a teacher"]),
    (finetune, lambda: (LABELLED(), Path("new").mkdir(), Path("new/report.md").touch()), "",
     ["new/report.md was not made by this command and would be replaced"]),
    (finetune, lambda: (with_classifier()(), with_file("new/layers.json", b"[]")()),
     "--model= --teacher teacher --student-layers 1",
     ["new/layers.json was not made by this command"]),
    (finetune, lambda: (with_classifier()(), with_file("new/answers/mine", b"")()),
     "--model= --teacher teacher", ["new/answers was not made by this command"]),
    (evaluate, lambda: (with_classifier()(), with_file("new/metrics.json", b"{}")()), "",
     ["--output new holds files that were not made by this command"]),
    (evaluate, LABELLED, "", ["teacher is BertForMaskedLM, not trained for a task"]),
    (evaluate, LABELLED, "--valid corpus.txt", ["--task, --data and --dev labelled data: give"]),
    (evaluate, lambda: (with_classifier()(), with_config(id2label={"no": 0, "yes": 1})()), "",
     ["teacher/config.json: id2label must be an object of numbers and names", "'no': 0"]),
    (evaluate, with_classifier(num_labels="2"), "", ["num_labels '2' is no whole number"]),
    (evaluate, with_classifier(problem_type="regression"), "", ["2 numbers: one is supported"]),
    (evaluate, with_classifier(), "--output gs://bucket/run", ["written to a folder of this"]),
    (evaluate, LABELLED, "--teacher teacher", ["--teacher teacher is compared on texts"]),
    (evaluate, with_classifier(), "--output a.csv", ["--output a.csv cannot be used: "]),
    (evaluate, with_classifier(), "--dev absent.csv", ["absent.csv: no such file"]),
    (evaluate, with_classifier(), "--kind regress", ["the model chooses among x, y"]),
]


@pytest.mark.parametrize("program, made, words, parts", TASKS_THAT_CANNOT)
def test_tasks_that_cannot_be(program, made, words, parts, place, capfd):
    made()
    first = TASK if program is finetune else "--model teacher --dev a.csv --output new"
    error = refused(program, once(first, words), capfd, last=True)
    assert all(part in error for part in parts), error


EMBED = "--teacher teacher --pooling mean --corpus corpus.txt --output new --steps 1 " \
    "--batch-size 8 --student-layers 1"
SAME = with_file("same.tsv", b"score\tsentence1\tsentence2\n1\tba\tbe\n1\tbu\tda\n")


def described():
    """The teacher is a sentence encoder."""
    with_file("teacher/modules.json", b'[{"type": "Transformer", "path": ""}, '
              b'{"type": "Pooling", "path": "1_Pooling"}]')()
    with_file("teacher/1_Pooling/config.json", b"{}")()


ENCODERS_THAT_CANNOT = [  # (program, what is made, words, parts of the message)
    (embed, None, "--pooling=", ["teacher is a masked language model without modules.json"]),
    (embed, None, "--pooling middle", ["unknown --pooling 'middle'", "cls, max, mean"]),
    (embed, with_file("teacher/modules.json", b"[]"), "", ["leave out --pooling"]),
    (embed, with_file("teacher/modules.json", b"{"), "--pooling=", ["modules.json cannot be read"]),
    (embed, described, "--pooling= --no-normalize", ["leave out --no-normalize"]),
    (evaluate, described, "--dev s.tsv", ["modules.json says how vectors are made: leave out"]),
    (embed, with_file("b.txt", b" \n"), "--corpus b.txt", ["no sentences in b.txt"]),
    (embed, None, "--corpus absent.txt", ["'absent.txt': no such file"]),
    (embed, None, "--teacher=", ["--teacher is missing"]),
    (embed, None, "--student-layers 3", ["--student-layers 3: the teacher has 2 layers"]),
    (embed, None, "--student-layers 0, --choose even", ["leave out --choose"]),
    (embed, None, "--alpha-vector 0", ["all loss weights are 0"]),
    (embed, None, "--alpha-ce 1", ["unknown flag '--alpha-ce'"]),
    (embed, None, "--hidden-map 1:1", ["--hidden-map 1:1 is read by no loss"]),
    (embed, None, "--vector-dtype int8", ["unknown --vector-dtype 'int8'"]),
    (embed, None, "--batch-size 4096", ["--batch-size 4096 is more than the"]),
    (embed, None, "--sts absent.tsv", ["absent.tsv: no such file"]),
    (embed, SAME, "--sts same.tsv", ["same.tsv: all 2 scores are 1: no correlation"]),
    (embed, SAME, "--retrieval same.tsv", ["same.tsv:1: not JSON"]),
    (embed, with_file("new/report.md", b""), "", ["new/report.md was not made by this command"]),
    (embed, None, "--output gs://bucket/run", ["written to a folder of this machine"]),
    (evaluate, SAME, "--dev same.tsv", ["same.tsv: all 2 scores are 1: no correlation"]),
    (evaluate, None, "", ["--dev is missing: give files of score, sentence1, sentence2"]),
    (evaluate, SAME, "--dev same.tsv --task cola", ["--pooling is for sentence encoders"]),
]


@pytest.mark.parametrize("program, made, words, parts", ENCODERS_THAT_CANNOT)
def test_encoders_that_cannot_be(program, made, words, parts, place, capfd):
    if made:
        made()
    first = EMBED if program is embed else "--model teacher --pooling mean --task sts --output new"
    error = refused(program, once(first, words), capfd, last=True)
    assert all(part in error for part in parts), error


OTHERS = [  # (program, what is made, all its words, parts of the message)
    (distil, None, "--teacher teacher", ["--corpus is missing"]),
    (distil, None, "--corpus corpus.txt", ["--teacher is missing"]),
    (distil, None, "--recipe rxn_bert --corpus corpus.txt", ["--teacher is missing"]),
    # the quickstart, before its teacher is trained
    (distil, None, "--student-layers 9", ["--student-layers 9: the teacher has 4 layers"]),
    (distil, None, "--sequence-length 513", ["--sequence-length 513", "512 positions"]),
    (distil, None, "--batch-size 12", ["--batch-size 12", "8 devices"]),
    (pretrain, None, "", ["--corpus is missing"]),
    (pretrain, None, f"{SCRATCH} --model ./nowhere", ["model folder ./nowhere does not exist"]),
    (pretrain, None, f"{SCRATCH} --hidden-size 30", ["--num-attention-heads 4 must divide "
                                                     "--hidden-size 30"]),
    (pretrain, None, f"{SCRATCH} --vocab-size 99", ["--vocab-size 99 must be at least 100"]),
    (pretrain, None, f"{SCRATCH} --num-hidden-layers 0", ["--num-hidden-layers 0"]),
    (pretrain, None, f"{SCRATCH} --teacher teacher", ["unknown flag '--teacher'"]),
    (pretrain, None, f"{SCRATCH} --recipe quickstart", ["unknown flag '--recipe'"]),
    (pretrain, None, f"{SCRATCH} --valid absent.txt", ["'absent.txt': no such file"]),
    (pretrain, with_file("b.txt", b"\n"), f"{SCRATCH} --valid b.txt", ["no text in b.txt"]),
    (pretrain, with_file("b.txt", b"\n"), f"{SCRATCH} --corpus b.txt", ["holds no words"]),
    (pretrain, with_file("new", b""), SCRATCH, ["--output new", "File exists"]),
    (pretrain, None, f"{ADAPT} --sequence-length 25", ["--sequence-length 25", "24 positions"]),
    (pretrain, without("teacher/tokenizer.json"), ADAPT, ["tokenizer in teacher"]),
    (pretrain, prepared(), f"{SCRATCH} --corpus ready", ["--corpus ready is prepared for another",
                                                         "give texts, or --model"]),
    (prepare, None, "", ["--tokenizer is missing"]),
    (prepare, None, "--tokenizer teacher", ["--corpus is missing"]),
    (prepare, None, f"{PREPARE} --tokenizer nowhere", ["no tokenizer in nowhere"]),
    (prepare, without("teacher/tokenizer.json"), PREPARE, ["tokenizer in teacher"]),
    (prepare, None, f"{PREPARE} --corpus absent.txt", ["'absent.txt': no such file"]),
    (prepare, None, f"{PREPARE} --valid absent.txt", ["'absent.txt': no such file"]),
    (prepare, with_file("b.txt", b"\n"), f"{PREPARE} --corpus b.txt", ["no text in b.txt"]),
    (prepare, with_file("b.txt", b"\n"), f"{PREPARE} --valid b.txt --output a/b/c",
     ["no text in b.txt"]),
    (prepare, with_file("l.txt", b"ba\n\xe4\n"), f"{PREPARE} --corpus l.txt", ["l.txt:2: not UTF"]),
    (prepare, None, f"{PREPARE} --shard 2/2", ["--shard 2/2 must look like 0/4"]),
    (prepare, None, f"{PREPARE} --shard 1", ["--shard 1 must look like 0/4"]),
    (prepare, None, f"{PREPARE} --mix 1 2", ["--mix has 2 weights, --corpus 1 words"]),
    (prepare, None, f"{PREPARE} --sequence-length 70000", ["must be at most 65535"]),
    (prepare, None, f"{PREPARE} --valid-share 1e-9", ["held-out share of 1e-09: give --valid"]),
    (prepare, None, f"{PREPARE} --teacher teacher", ["unknown flag '--teacher'"]),
    (prepare, with_file("new", b""), PREPARE, ["new exists and is not prepared data"]),
    (prepare, with_file("file", b""), f"{PREPARE} --output file/new", ["file/new", "Not a dir"]),
    (prepare, None, f"{PREPARE} --output .", [". exists and is not prepared data"]),
    (prepare, None, f"{PREPARE} --output /", ["/ exists and is not prepared data"]),
    (prepare, None, f"{PREPARE} --output {'x' * 300}", ["File name too long"]),
    (prepare, prepared("--valid-share", "0.3"), f"{PREPARE} --output ready",
     ["ready was prepared with another valid (0.3, now 0.02): delete it or name another"]),
    (prepare, prepared(change=with_file("corpus.txt", b"ba be\n")), f"{PREPARE} --output ready",
     ["ready was prepared with another corpus: delete it or name another"]),
]


@pytest.mark.parametrize("program, made, words, parts", OTHERS)
def test_whole_commands_that_cannot_be(program, made, words, parts, place, capfd):
    if made:
        made()
    error = refused(program, once(words), capfd)
    assert all(part in error for part in parts), error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_the_right_to_write(place, capfd):
    (place / "new").mkdir(mode=0o555)
    error = refused(distil, TEACHER.split(), capfd)
    assert "--output new cannot be used: Permission denied" in error


def noted(error, note):
    error.add_note(note)
    return error


@pytest.mark.parametrize("ending, code, said", [
    (Interrupted("stopped at update 3"), 75, "stopped at update 3\n"),
    (signal.SIGTERM, 75, "terminated; the same command goes on from what is complete\n"),
    (noted(KeyboardInterrupt(), "so it goes on"), "interrupted; so it goes on", ""),
    (KeyboardInterrupt(), "interrupted", "")])
def test_other_endings(ending, code, said, capfd):
    def main(_):
        assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"  # that PyTorch is not there
        if ending is signal.SIGTERM:
            os.kill(os.getpid(), ending)
        raise ending

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        launch.launch(main, [])
    assert end.value.code == code and capfd.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("platform, said, noted", [
    ("gpu", "", True), ("tpu", "", True), ("gpu", "xla", False), ("cpu", "", False)])
def test_an_error_of_a_kernel_names_the_way_out(platform, said, noted, monkeypatch):
    def main(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas failed")

    monkeypatch.setattr(products, "device_here", lambda: (platform, "9.0"))
    monkeypatch.setenv("DISTILBERT_JAX_KERNELS", said)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        launch.launch(main, [])
    notes = "".join(traceback.format_exception(error.value)).splitlines()[-1]
    assert ("DISTILBERT_JAX_KERNELS=xla before the same command" in notes) == noted


def test_an_unknown_value_of_the_switch(place, monkeypatch, capfd):
    monkeypatch.setenv("DISTILBERT_JAX_KERNELS", "off")
    error = refused(distil, TEACHER.split(), capfd)
    assert "DISTILBERT_JAX_KERNELS=off must be xla, which turns the kernels for GPUs" in error


def command(script, *words, **environment):
    return subprocess.run([sys.executable, EXPERIMENTS / script, *words], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, env=os.environ | environment)


def test_help(place):
    """Of a script; what stands in it is seen in test_config.py."""
    done = command("run.py", "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"\n{group}:\n" in done.stdout for group in (
        "data", "models", "losses", "training", "devices", "output"))
    assert f"(known: {', '.join(sorted(recipes()))})" in " ".join(done.stdout.split())


def test_an_error_in_a_process_of_its_own(place):
    """Without the type checker of the tests, which would find it first."""
    with_config(hidden_size=None)()
    before = tree(place)
    done = command("run.py", *once(TEACHER))
    assert done.returncode == 2 and tree(place) == before and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: teacher: config.json: hidden_size None is not a positive")


def test_a_platform_that_is_not_there(place):
    done = command("run.py", *TEACHER.split(), JAX_PLATFORMS="cuda")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: JAX_PLATFORMS=cuda names no platform that can be used")


@pytest.mark.parametrize("after", [">&-", "> /dev/full", "| head -1"])
def test_output_without_a_reader(after, place):
    """What is printed is for people; a run ends as it would with them."""
    words = " ".join(once(PREPARE))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c",
         f"{sys.executable} {EXPERIMENTS / 'prepare.py'} {words} {after}"],
        capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (place / "new" / "manifest.json").exists()


def test_output_that_takes_no_utf_8(place):
    """Arrows and other scripts are replaced; nothing ends a run because it cannot be printed."""
    done = command("prepare.py", "--tokenizer", "teacher", "--corpus", "corpus.txt", "--output",
                   "ready", "--valid-share", "0.3", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "characters ? " in done.stdout and done.stdout.isascii()
