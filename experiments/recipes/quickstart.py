"""The quickstart: a small teacher on the documentation of Python, and its student, on a laptop.

Command:   python experiments/run.py
"""

PRETRAIN = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64, steps=1500, batch_size=64,
    learning_rate=2e-3, warmup=0.1, weight_decay=0.01, dropout=0.0, vocab_size=4096,
    hidden_size=128, num_hidden_layers=4, num_attention_heads=4, eval_every=500, save_every=500,
)

DISTIL = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64, steps=600, batch_size=64,
    learning_rate=1e-3, dropout=0.0, eval_every=100, save_every=300, output="output/quickstart",
)
