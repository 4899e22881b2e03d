"""The table of families: `model_type` of a config.json → what its files look like."""

from distilbert_jax.models import bert, distilbert, roberta
from distilbert_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (
        bert.FAMILY, distilbert.FAMILY, roberta.FAMILY, roberta.XLM_R, roberta.CAMEMBERT)}
