"""Table 4 of the paper: what each loss, and the start, is worth.

Command:   python experiments/ablate.py --recipe table_4 --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz --seeds 5 --output output/table-4
Hardware:  2 CPU cores. Score: experiments/README.md, with --steps 100.

rxn_bert with a tenth of its updates: rows are compared at equal tokens.
"""

from distilbert_jax.recipes import rxn_bert

DISTIL = rxn_bert.DISTIL | dict(steps=170, eval_every=170)
ABLATION = {
    "all losses": {},
    "no KL": {"alphas": {"mlm": 2.0, "cos": 1.0}},
    "no cosine": {"alphas": {"ce": 5.0, "mlm": 2.0}},
    "no MLM": {"alphas": {"ce": 5.0, "cos": 1.0}},
    "random start": {"init": "random"},
}
