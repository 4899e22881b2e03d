"""BERT (Devlin et al. 2019), which the other families are variations of.

Its student is a DistilBERT, which has no token types and one LayerNorm epsilon.
"""

import dataclasses

from distilbert_jax.models import distilbert
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family


def _distilbert(config: EncoderConfig) -> tuple[Family, EncoderConfig]:
    return distilbert.FAMILY, dataclasses.replace(config, **distilbert.FAMILY.fixed)


FAMILY = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    prefix="bert.",
    config=(
        ("vocab_size", "vocab_size", 30522),
        ("hidden_size", "hidden_size", 768),
        ("num_hidden_layers", "num_hidden_layers", 12),
        ("num_attention_heads", "num_attention_heads", 12),
        ("intermediate_size", "intermediate_size", 3072),
        ("max_position_embeddings", "max_position_embeddings", 512),
        ("type_vocab_size", "type_vocab_size", 2),
        ("hidden_act", "hidden_act", "gelu"),
        ("layer_norm_eps", "layer_norm_eps", 1e-12),
        ("hidden_dropout", "hidden_dropout_prob", 0.1),
        ("attention_dropout", "attention_probs_dropout_prob", 0.1),
        ("initializer_range", "initializer_range", 0.02),
        ("pad_token_id", "pad_token_id", 0),
    ),
    fixed={},
    written={},
    tensors={
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
    },
    heads={
        "classify": {"bert.pooler.dense": "task_head/dense", "classifier": "task_head/output"},
        "regress": {"bert.pooler.dense": "task_head/dense", "classifier": "task_head/output"},
        "tag": {"classifier": "task_head/output"},
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=(
        "bert.embeddings.position_ids", "cls.seq_relationship.weight",
        "cls.seq_relationship.bias"),
    other_student=_distilbert,
)

# Devlin et al. 2019, section 3, with the vocabulary of bert-base-uncased.
BASE = FAMILY.from_hf({})
