"""RoBERTa (Liu et al. 2019), XLM-R (Conneau et al. 2020) and CamemBERT (Martin et al. 2020), and
what is different in them from BERT:

positions begin at row pad_token_id + 1 of their table, so that 514 rows hold 512 tokens; the head
always has the exact GELU; a student is of the family itself.
"""

import dataclasses

from distilbert_jax.models import bert

FAMILY = dataclasses.replace(
    bert.FAMILY,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    prefix="roberta.",
    config=tuple(
        {"vocab_size": (*row[:2], 50265), "pad_token_id": (*row[:2], 1)}.get(row[0], row)
        for row in bert.FAMILY.config),
    fixed={"offset_positions": True, "head_act": "gelu", "head_input_dropout": True},
    tensors={theirs.replace("bert.", "roberta.", 1): ours
             for theirs, ours in bert.FAMILY.tensors.items() if theirs.startswith("bert.")} | {
        "lm_head.dense": "mlm_head/transform",
        "lm_head.layer_norm": "mlm_head/norm",
        "lm_head": "mlm_head",
    },
    heads={
        "classify": {"classifier.dense": "task_head/dense",
                     "classifier.out_proj": "task_head/output"},
        "regress": {"classifier.dense": "task_head/dense",
                    "classifier.out_proj": "task_head/output"},
        "tag": {"classifier": "task_head/output"},
    },
    tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
          "lm_head.decoder.bias": "lm_head.bias"},
    ignored=("roberta.embeddings.position_ids",),
    other_student=None,
)

_MULTILINGUAL = tuple(
    (*row[:2], 30522) if row[0] == "vocab_size" else row for row in FAMILY.config)
XLM_R = dataclasses.replace(
    FAMILY, model_type="xlm-roberta", architecture="XLMRobertaForMaskedLM", config=_MULTILINGUAL)
CAMEMBERT = dataclasses.replace(
    FAMILY, model_type="camembert", architecture="CamembertForMaskedLM", config=_MULTILINGUAL)
