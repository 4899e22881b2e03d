"""A smaller sentence encoder in the space of its teacher, in Python:

    python experiments/examples/embed.py TEACHER text.jsonl
"""

import sys

import distilbert_jax as dj


def main(teacher: str, corpus: str, **settings: object) -> dj.Result:
    result = dj.embed(**dict(
        teacher=teacher, corpus=corpus, student_layers=2, output="output/embed") | settings)
    near = result.report["to_teacher"]["student"]
    print(f"cosine to the teacher's vectors: mean {near['mean']:.3f}, worst {near['worst']:.3f}")
    one, other = result.predictor().embed(["A sentence.", "Another one."])
    print(f"dot product of two sentences: {one @ other:.3f}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
