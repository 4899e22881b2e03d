"""A quarter of the layers, or fewer: a start that is near, harder masks, states from the disk.

Command:   python experiments/run.py --recipe few_layers --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz --student-layers 3
Hardware:  2 CPU cores with AVX512-BF16. Score: 97.1 and 97.2 % of the teacher's top-1.

The teacher reads the corpus once; its states (517 bytes a token, 8.4 GB of this corpus) serve all
students of one seed: --states DIR. The rate and the optimizer were chosen on documents held out of
the training file: experiments/README.md.
"""

from distilbert_jax.recipes import rxn_bert

DISTIL = rxn_bert.DISTIL | dict(
    student_layers="3",
    choose="greedy",
    mask_rate=0.4,
    learning_rate=1e-3,
    kept_maskings=1,
    steps=9500,  # x 16 rows x 190 tokens = 28.9 M tokens, 1.8 passes
    save_every=500,
    eval_every=500,
)
