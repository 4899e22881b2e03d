"""Half of the layers: a start that is near, Muon, the teacher's hidden states.

Command:   python experiments/run.py --recipe half_layers --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz
Hardware:  2 CPU cores with AVX512-BF16. Score: 100.4 % of the teacher's top-1.

Batch, share of masked tokens and weight of the labels were chosen on documents held out of the
training file: experiments/README.md.
"""

from distilbert_jax.recipes import rxn_bert

DISTIL = rxn_bert.DISTIL | dict(
    choose="greedy",
    optimizer="muon",
    learning_rate=2e-3,
    alphas={"ce": 5.0, "mlm": 2.0, "cos": 1.0, "hidden": 3.0},
    batch_size=32,
    steps=850,  # x 32 rows x 190 tokens = 5.2 M tokens, a third of the corpus
)
