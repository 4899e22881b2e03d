"""DistilBERT: its config.json and the names of its tensors in Hugging Face files.

BERT without token types and pooler, and without dropout after the attention's output projection
(Sanh et al. 2019, section 3). transformers fixes its LayerNorm epsilon at 1e-12.
"""

from typing import Any

from distilbert_jax.models.encoder import EncoderConfig

MODEL_TYPE = "distilbert"
ARCHITECTURE = "DistilBertForMaskedLM"
PREFIX = "distilbert."  # files of a bare DistilBertModel leave it out

MODULES = {
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
}

TIED = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
IGNORED = ("distilbert.embeddings.position_ids",)


def from_hf(config: dict[str, Any]) -> EncoderConfig:
    """Read a config.json; keys that are absent take transformers' defaults."""
    return EncoderConfig(
        vocab_size=config.get("vocab_size", 30522),
        hidden_size=config.get("dim", 768),
        num_hidden_layers=config.get("n_layers", 6),
        num_attention_heads=config.get("n_heads", 12),
        intermediate_size=config.get("hidden_dim", 3072),
        max_position_embeddings=config.get("max_position_embeddings", 512),
        type_vocab_size=0,
        hidden_act=config.get("activation", "gelu"),
        hidden_dropout=config.get("dropout", 0.1),
        attention_dropout=config.get("attention_dropout", 0.1),
        attention_output_dropout=False,
        initializer_range=config.get("initializer_range", 0.02),
        pad_token_id=config.get("pad_token_id", 0),
    )


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of `config`."""
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "activation": config.hidden_act,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "sinusoidal_pos_embds": False,
    }
