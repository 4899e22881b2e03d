"""Kill a distillation at random moments, start it again, and compare the end bit for bit.

    python experiments/chaos.py --kills 20

A toy distillation runs once undisturbed. Then the same command is killed (SIGKILL) and started
again, half of the times at a random moment and half while a checkpoint is being written, until it
has been killed so often; whenever it gets to its end, the student is compared byte for byte with
that of the undisturbed run, and a new one begins. Exit code 1 if one differs.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launch  # noqa: F401  (the package of this clone)

from distilbert_jax.commands.launch import launch as launched
from distilbert_jax.data.tokenize import train_wordpiece
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.export.huggingface import export
from distilbert_jax.models import bert
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.start import init_params

FLAGS = ("--steps 120 --batch-size 8 --sequence-length 32 --save-every 10 --eval-every 40 "
         "--learning-rate 1e-3 --seed 1").split()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args(argv)
    if options.kills < 1:
        raise UserError(f"--kills {options.kills} must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        kills, in_save, ends = rampage(Path(folder), options.kills, random.Random(options.seed))
    print(f"{kills} kills, {in_save} of them while a checkpoint was being written; "
          f"{sum(ends)} of {len(ends)} runs ended bit for bit as the undisturbed one")
    print(report.versions())
    sys.exit(0 if all(ends) else 1)


def rampage(folder: Path, wanted: int, moments: random.Random) -> tuple[int, int, list[bool]]:
    """Kill `wanted` times; kills, those during a save, and whether each end was the right one."""
    make_toy(folder)
    began = time.monotonic()
    if start(folder, "undisturbed").wait():
        raise UserError(f"the undisturbed run failed: {(folder / 'log').read_text()[-500:]}")
    duration, expected = time.monotonic() - began, weights(folder / "undisturbed")
    kills = in_save = 0
    ends: list[bool] = []
    while kills < wanted or not ends:
        output = f"run-{len(ends)}"
        run = start(folder, output)
        if kills < wanted:
            caught = wait_for_save(run, folder / output) if kills % 2 else wait(
                run, moments.uniform(0, duration))
            time.sleep(moments.uniform(0, 0.02) if caught else 0)
            in_save += caught and saving(folder / output)
            run.kill()
        if run.wait() == 0:  # it was at its end before it was killed
            ends.append(weights(folder / output) == expected)
        elif run.returncode == -9:
            kills += 1
            print(f"killed {kills} of {wanted}", file=sys.stderr)
        else:
            raise UserError(f"a continuation failed: {(folder / 'log').read_text()[-500:]}")
    return kills, in_save, ends


def make_toy(folder: Path) -> None:
    """teacher/ and corpus.txt: a small BERT that starts at random, words that repeat."""
    words = [a + b for a in "bdfgklmn" for b in "aeu"]
    texts = [" ".join([word] * n) for word in words for n in range(4, 24)]
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    tokenizer = train_wordpiece(texts, 100)
    shape = EncoderConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, type_vocab_size=2)
    params = init_params(shape, seed=0)
    export(folder / "teacher", params, shape, bert.FAMILY, tokenizer, "A toy.\n")


def start(folder: Path, output: str) -> "subprocess.Popen[bytes]":
    """The same command every time; compiled programs are kept, so that it starts quickly."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = ["--teacher", "teacher", "--corpus", "corpus.txt", "--output", output, *FLAGS]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run.py")), *words], cwd=folder,
            env=environment, stdout=log, stderr=log)


def wait(run: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Let it run; False: no save is waited for."""
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    return False


def wait_for_save(run: "subprocess.Popen[bytes]", output: Path) -> bool:
    """Until a checkpoint is being written, or the run has ended."""
    while run.poll() is None:
        if saving(output):
            return True
        time.sleep(0.002)
    return False


def saving(output: Path) -> bool:
    """Whether a checkpoint is there that Orbax has not finished."""
    return any((output / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def weights(output: Path) -> bytes:
    """The exported student."""
    return (output / "student" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    launched(main, sys.argv[1:])
