"""What each change is worth for a student of 3 of 12 layers.

Command:   python experiments/ablate.py --recipe three_layers --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz --output output/three-layers
Hardware:  2 CPU cores. Score: experiments/README.md, with --steps 100.

Each row changes one thing of the first; the third, the plain recipe's, two.
"""

from distilbert_jax.recipes import rxn_bert

DISTIL = rxn_bert.DISTIL | dict(
    student_layers="3", choose="greedy", mask_rate=0.4, steps=170, eval_every=170)
PAPER = {"ce": 5.0, "mlm": 2.0, "cos": 1.0}
ABLATION = {
    "greedy layers, 40 % masked": {},
    "15 % masked": {"mask_rate": 0.15},
    "even layers, 15 % masked": {"choose": "even", "mask_rate": 0.15},
    "and hidden states": {"alphas": PAPER | {"hidden": 3.0}},
    "and their cosine (PKD)": {"alphas": PAPER | {"inner": 3.0}},
    "and relations (MiniLMv2)": {"alphas": PAPER | {"relation": 1.0}},
    "skew KL in place of KL": {"alphas": {"skew": 5.0, "mlm": 2.0, "cos": 1.0}},
    "KL at masked tokens alone": {"restrict_ce_to_mask": True},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 2e-3": {"learning_rate": 2e-3},
    "Muon, rate 2e-3": {"learning_rate": 2e-3, "optimizer": "muon"},
    "float32": {"dtype": "float32"},
}
