"""A small classifier from labelled data, in Python: fine-tuned, distilled, and compared.

    python experiments/examples/finetune.py MODEL train.csv dev.csv
"""

import sys

import distilbert_jax as dj


def main(model: str, train: str, dev: str, **settings: object) -> dj.Result:
    result = dj.finetune(**dict(
        model=model, train=train, dev=dev, distil=True, student_layers=[0, 1],
        output="output/task") | settings)
    for name, figures in result.report["parts"]["dev"].items():
        print(f"{name}: score {figures['score']}")
    print(result.predictor().classify(["A text to classify."]))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
