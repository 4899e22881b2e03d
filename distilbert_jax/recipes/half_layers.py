"""Half of the layers, with fewer tokens: a start that is near, Muon, hidden states of the teacher.

Command:   python experiments/run.py --recipe half_layers --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz
Hardware:  2 CPU cores with AVX512-BF16. Score: experiments/README.md.

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
    steps=425,  # x 32 rows x 190 tokens = 2.6 M tokens, a sixth of the corpus
)
