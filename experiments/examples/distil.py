"""A masked language model of 2 layers from a larger one, in Python:

    python experiments/examples/distil.py TEACHER text.jsonl
"""

import sys

import distilbert_jax as dj


def main(teacher: str, corpus: str, **settings: object) -> dj.Result:
    result = dj.distil(**dict(
        teacher=teacher, corpus=corpus, student_layers=2, output="output/distil") | settings)
    for name, figures in result.report["models"].items():
        print(f"{name}: {figures['layers']} layers, top-1 {figures['top1']:.2%}")
    text = "A text with one [MASK] word."  # of RoBERTa: <mask>
    for word, probability in result.predictor().fill_mask([text])[0][0]:
        print(f"{word} {probability:.1%}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
