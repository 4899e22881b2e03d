"""BERT: its config.json and the names of its tensors in Hugging Face files."""

from typing import Any

from distilbert_jax.models.encoder import EncoderConfig

MODEL_TYPE = "bert"
ARCHITECTURE = "BertForMaskedLM"
PREFIX = "bert."  # files of a bare BertModel leave it out

# Hugging Face module → ours; {i} is the layer. A leaf's own name follows from its kind.
MODULES = {
    "bert.embeddings.word_embeddings": "embeddings/word",
    "bert.embeddings.position_embeddings": "embeddings/position",
    "bert.embeddings.token_type_embeddings": "embeddings/token_type",
    "bert.embeddings.LayerNorm": "embeddings/norm",
    "bert.encoder.layer.{i}.attention.self.query": "layers/{i}/attention/query",
    "bert.encoder.layer.{i}.attention.self.key": "layers/{i}/attention/key",
    "bert.encoder.layer.{i}.attention.self.value": "layers/{i}/attention/value",
    "bert.encoder.layer.{i}.attention.output.dense": "layers/{i}/attention/output",
    "bert.encoder.layer.{i}.attention.output.LayerNorm": "layers/{i}/attention_norm",
    "bert.encoder.layer.{i}.intermediate.dense": "layers/{i}/ffn/up",
    "bert.encoder.layer.{i}.output.dense": "layers/{i}/ffn/down",
    "bert.encoder.layer.{i}.output.LayerNorm": "layers/{i}/output_norm",
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "mlm_head/transform",
    "cls.predictions.transform.LayerNorm": "mlm_head/norm",
    "cls.predictions": "mlm_head",
}

# Tensors that files may also hold. A tied one must equal the tensor it repeats.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
IGNORED = (
    "bert.embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias")


# Devlin et al. 2019, section 3, with the vocabulary of bert-base-uncased.
BASE = EncoderConfig(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, max_position_embeddings=512, type_vocab_size=2)


def from_hf(config: dict[str, Any]) -> EncoderConfig:
    """Read a config.json; keys that are absent take BERT-base's values, as in transformers."""
    return EncoderConfig(
        vocab_size=config.get("vocab_size", 30522),
        hidden_size=config.get("hidden_size", 768),
        num_hidden_layers=config.get("num_hidden_layers", 12),
        num_attention_heads=config.get("num_attention_heads", 12),
        intermediate_size=config.get("intermediate_size", 3072),
        max_position_embeddings=config.get("max_position_embeddings", 512),
        type_vocab_size=config.get("type_vocab_size", 2),
        hidden_act=config.get("hidden_act", "gelu"),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        hidden_dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        initializer_range=config.get("initializer_range", 0.02),
        pad_token_id=config.get("pad_token_id", 0),
    )


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of `config`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
    }
