"""A real 12-layer BERT of chemical reactions, to 6 layers (or 3) on two CPU cores in an hour.

Command:   python experiments/run.py --recipe rxn_bert --teacher ../shared/data/rxn-bert \\
               --corpus ../shared/data/uspto-reactions/train.txt.gz \\
               --valid ../shared/data/uspto-reactions/valid.txt.gz --output output/rxn-6
           and with --student-layers 3 --output output/rxn-3
Hardware:  2 CPU cores, float32. Score: see the README.

Rows of 192 tokens hold 99 of 100 reactions whole. Dropout is off: a run that sees no row twice has
nothing to overfit, and on a CPU the masks of dropout cost more than a layer does.
"""

DISTIL = dict(
    sequence_length=192,
    batch_size=16,
    steps=1700,  # x 16 rows x 190 tokens = 5.2 M tokens, a third of the corpus
    learning_rate=7e-4,
    warmup=0.05,
    dropout=0.0,
    student_layers="6",
    save_every=200,
    eval_every=100,
)
