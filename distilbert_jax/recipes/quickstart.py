"""The quickstart: a small teacher on the documentation of Python, and its student, on a laptop.

Command:   python experiments/run.py
Hardware:  2 CPU cores, under 5 minutes. Score: see the README.
"""

PRETRAIN = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64,
    vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
    steps=2000,  # x 16 rows x 64 tokens = 2.0 M tokens
    batch_size=16, learning_rate=1.5e-3, warmup=0.1, weight_decay=0.01, dropout=0.0,
    eval_every=400, save_every=1000,
)

DISTIL = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64,
    steps=300,  # x 32 rows x 64 tokens = 0.6 M tokens
    batch_size=32, learning_rate=1e-3, dropout=0.0,
    eval_every=50, save_every=150, output="output/quickstart",
)
