"""The quickstart: a small teacher on the documentation of Python, and its student, on a laptop.

Command:   python experiments/run.py
Hardware:  2 CPU cores, under 5 minutes. Score: see the README.
"""

# Three minutes teach a Transformer that starts from nothing little more than which word pieces are
# frequent; the recipe shows the whole path, rxn_bert shows what distillation keeps.
PRETRAIN = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64,
    vocab_size=1024, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
    steps=600,  # x 32 rows x 64 tokens = 1.2 M tokens
    batch_size=32, learning_rate=1e-3, warmup=0.1, weight_decay=0.01, dropout=0.0,
    eval_every=150, save_every=300,
)

DISTIL = dict(
    corpus=("python-docs",), valid_share=0.05, sequence_length=64,
    steps=200,  # x 32 rows x 64 tokens = 0.4 M tokens
    batch_size=32, learning_rate=1e-3, dropout=0.0,
    eval_every=40, save_every=100, output="output/quickstart",
)
