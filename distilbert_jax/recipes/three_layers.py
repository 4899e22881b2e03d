"""What each change is worth for a student of 3 of 12 layers.

Command:   python experiments/ablate.py --recipe three_layers --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz --output output/three-layers
Hardware:  2 CPU cores, float32. Score: not measured yet.

Each row but the last two adds to the one before it.
"""

from distilbert_jax.recipes import rxn_bert

DISTIL = rxn_bert.DISTIL | dict(student_layers="3", steps=170, eval_every=170)
GREEDY = {"choose": "greedy"}
MASKED = GREEDY | {"mask_rate": 0.4}
ABLATION = {
    "even layers": {},
    "greedy layers": GREEDY,
    "greedy, 40 % masked": MASKED,
    "greedy, 40 %, hidden states": MASKED | {
        "alphas": {"ce": 5.0, "mlm": 2.0, "cos": 1.0, "hidden": 3.0}},
    "greedy, 40 %, rate 1e-3": MASKED | {"learning_rate": 1e-3},
    "greedy, 40 %, rate 2e-3": MASKED | {"learning_rate": 2e-3},
}
