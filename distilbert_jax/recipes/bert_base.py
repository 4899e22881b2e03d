"""The paper's own run: BERT-base to DistilBERT (Sanh et al. 2019, sections 3 and 4).

Command:   python experiments/run.py --recipe bert_base --teacher bert-base-uncased \\
               --corpus wikipedia/*.jsonl.gz bookcorpus/*.txt.gz --output distilbert --mesh 8x1
Hardware:  the paper: 8 x V100 16 GB, about 90 hours. Here: not run; neither the corpora nor the
           accelerators were at hand.
Score:     the paper: 97 % of BERT-base on GLUE dev (77.0 of 79.5).

Weights 5 / 2 / 1, temperature 2, frozen positions and the optimizer are the reference's documented
command; batch 4,000 is the paper's "up to 4K examples". Left out: the reference lets a
random replacement be a special token and starts the MLM transform at random; see
training/labels.py and models/student.py.
"""

DISTIL = dict(
    sequence_length=512,
    batch_size=4000,
    # 8 chips: 500 rows each, in 10 micro-batches of 50
    accumulate=10,
    # 4.3 B tokens x 3 epochs / (4000 rows x 512 tokens) = 6,300 updates
    steps=6300,
    learning_rate=5e-4,
    warmup=0.05,
    weight_decay=0.0,
    clip=5.0,
    dropout=0.1,
    temperature=2.0,
    alphas={"ce": 5.0, "mlm": 2.0, "cos": 1.0},
    freeze_position_embeddings=True,
    fold_token_type=False,
    save_every=250,
    eval_every=250,
)
