"""DistilBERT (Sanh et al. 2019, section 3), and what is different in it from BERT:

no token types, no pooler, no dropout after the attention's output projection; a LayerNorm epsilon
of 1e-12, because transformers' DistilBERT knows no other.
"""

from distilbert_jax.models.family import Family

FAMILY = Family(
    model_type="distilbert",
    architecture="DistilBertForMaskedLM",
    prefix="distilbert.",
    config=(
        ("vocab_size", "vocab_size", 30522),
        ("hidden_size", "dim", 768),
        ("num_hidden_layers", "n_layers", 6),
        ("num_attention_heads", "n_heads", 12),
        ("intermediate_size", "hidden_dim", 3072),
        ("max_position_embeddings", "max_position_embeddings", 512),
        ("hidden_act", "activation", "gelu"),
        ("hidden_dropout", "dropout", 0.1),
        ("attention_dropout", "attention_dropout", 0.1),
        ("initializer_range", "initializer_range", 0.02),
        ("pad_token_id", "pad_token_id", 0),
    ),
    fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "attention_output_dropout": False,
           "pooler_act": "relu"},
    written={"sinusoidal_pos_embds": False},
    tensors={
        "distilbert.embeddings.word_embeddings": "embeddings/word",
        "distilbert.embeddings.position_embeddings": "embeddings/position",
        "distilbert.embeddings.LayerNorm": "embeddings/norm",
        "distilbert.transformer.layer.{i}.attention.q_lin": "layers/{i}/attention/query",
        "distilbert.transformer.layer.{i}.attention.k_lin": "layers/{i}/attention/key",
        "distilbert.transformer.layer.{i}.attention.v_lin": "layers/{i}/attention/value",
        "distilbert.transformer.layer.{i}.attention.out_lin": "layers/{i}/attention/output",
        "distilbert.transformer.layer.{i}.sa_layer_norm": "layers/{i}/attention_norm",
        "distilbert.transformer.layer.{i}.ffn.lin1": "layers/{i}/ffn/up",
        "distilbert.transformer.layer.{i}.ffn.lin2": "layers/{i}/ffn/down",
        "distilbert.transformer.layer.{i}.output_layer_norm": "layers/{i}/output_norm",
        "vocab_transform": "mlm_head/transform",
        "vocab_layer_norm": "mlm_head/norm",
        "vocab_projector": "mlm_head",
    },
    heads={
        "classify": {"pre_classifier": "task_head/dense", "classifier": "task_head/output"},
        "regress": {"pre_classifier": "task_head/dense", "classifier": "task_head/output"},
        "tag": {"classifier": "task_head/output"},
    },
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=("distilbert.embeddings.position_ids",),
)
