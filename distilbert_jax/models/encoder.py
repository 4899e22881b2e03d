"""The post-LN encoder and MLM head that BERT and DistilBERT share, with its sharding rows.

Token ids [B, T] come in, hidden states [B, T, D] go out; `mlm_logits` turns any of those into
logits over the vocabulary. The modules only describe the structure: outside this package a model
is a graphdef and a nested dict of arrays, joined by `nnx.merge` inside the jitted step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distilbert_jax.kernels.attention import AttentionMask, attention
from distilbert_jax.kernels.dropout import RowKeys, dropout, dropped
from distilbert_jax.kernels.products import affine, has_triton, wide
from distilbert_jax.models.sentence_modules import Sentence
from distilbert_jax.models.vectors import DENSE_ACTIVATIONS, normalized, pool


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the exact GELU x · Φ(x), Φ the standard normal CDF (Hendrycks and Gimpel 2016).

    Φ is computed by erf, as in PyTorch: the erfc of jax.nn.gelu takes more than twice as long on a
    CPU, and costs the TPU compiler 5 s in every layer. The backward pass keeps x alone.

    Args:
        x: of any shape; computed in at least float32.

    Returns:
        An array of the shape and dtype of x.
    """
    x32 = x.astype(wide(x.dtype))
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x: Float[Array, "..."]) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Float[Array, "..."], cotangent: Float[Array, "..."]) -> tuple[Array]:
    x32 = x.astype(wide(x.dtype))
    density = jnp.exp(-0.5 * x32 * x32) / math.sqrt(2 * math.pi)
    return ((cotangent * (_normal_cdf(x32) + x32 * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder, in Hugging Face's words."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int  # 0: no token-type embeddings (DistilBERT)
    hidden_act: str = "gelu"
    head_act: str | None = None  # of the language-modelling head; None: as hidden_act
    offset_positions: bool = False  # position 0 is row pad_token_id + 1 of the table (RoBERTa)
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention_output_dropout: bool = True  # False for DistilBERT
    pooler: bool = False
    mlm_head: bool = True
    task: str = ""  # classify, regress or tag: there is a head for it; "": there is none
    num_labels: int = 0  # that the task's head has
    sentence: Sentence | None = None  # how a text's states become its vector; None: they do not
    pooler_act: str = "tanh"  # of the task's head
    head_dropout: float | None = None  # before the task's last layer; None: as hidden_dropout
    head_input_dropout: bool = False  # before the task's first layer, too (RoBERTa)
    initializer_range: float = 0.02
    pad_token_id: int = 0

    @property
    def position_offset(self) -> int:
        """Row of the position table that belongs to position 0."""
        return self.pad_token_id + 1 if self.offset_positions else 0

    @property
    def positions(self) -> int:
        """Tokens of the longest row."""
        return self.max_position_embeddings - self.position_offset


At = Int[Array, "B S"] | None  # positions in each row; None for all


def gathered(x: Float[Array, "B T D"], at: At) -> Float[Array, "B S D"]:
    """The vectors of x at some positions of each row."""
    return x if at is None else jnp.take_along_axis(x, at[..., None], axis=1)


class Seen(NamedTuple):
    """What a model shows of a batch."""

    last: Float[Array, "B S D"]  # at the positions that were asked for
    hidden: dict[int, Float[Array, "B T D"]]  # layer, from 1 → its states; 0: the embeddings
    qkv: dict[int, Float[Array, "3 B T D"]]  # layer, from 1 → its queries, keys and values


class Linear(nnx.Linear):
    """A linear layer x @ kernel + bias, [..., D] → [..., F], computed by `kernels/products.py`."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = jnp.asarray(self.kernel[...])
        bias = jnp.asarray(self.bias[...]) if self.use_bias else jnp.zeros_like(kernel[0])
        return affine(x.astype(self.dtype), kernel, bias)


class Embed(nnx.Embed):
    """An embedding table, ids [...] → vectors [..., D], whose gradient is summed as parameters are.

    It looks up first and casts to the compute dtype after, so that the cotangents of all positions
    of a word are summed in the dtype of the parameters. nnx.Embed casts the table first: a sum of
    thousands in bfloat16 stands still, and the gradient of a frequent word was a third off.
    """

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return jnp.take(jnp.asarray(self.embedding[...]), ids, axis=0).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with its four projections."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value, self.output = (
            _linear(width, width, config, dtypes, rngs) for _ in range(4)
        )
        self.dropout = config.attention_dropout

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], keys: RowKeys, at: At
    ) -> Float[Array, "B S D"]:
        given = (gathered(x, at), x, x)
        q, k, v = (f(states).reshape(*states.shape[:2], self.num_heads, -1) for f, states in zip(
            (self.query, self.key, self.value), given, strict=True))  # [B, T, N, H]
        context = attention(q, k, v, AttentionMask(segment_ids), dropout(self.dropout, keys), at)
        return self.output(context.reshape(given[0].shape))

    def qkv(self, x: Float[Array, "B T D"]) -> Float[Array, "3 B T D"]:
        """Queries, keys and values of all heads, which the compiler shares with those above."""
        return jnp.stack([project(x) for project in (self.query, self.key, self.value)])


class FeedForward(nnx.Module):
    """Two projections around the activation."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        self.up = _linear(config.hidden_size, config.intermediate_size, config, dtypes, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, config, dtypes, rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(self.activation(self.up(x)))


class Layer(nnx.Module):
    """One post-LN encoder layer."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        self.attention = Attention(config, dtypes, rngs)
        self.attention_norm = _layer_norm(config, dtypes, rngs)
        self.ffn = FeedForward(config, dtypes, rngs)
        self.output_norm = _layer_norm(config, dtypes, rngs)
        self.dropout = config.hidden_dropout
        self.attended_dropout = config.hidden_dropout if config.attention_output_dropout else 0.0

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], keys: RowKeys,
        at: At = None,
    ) -> Float[Array, "B S D"]:
        attended = self.attention(x, segment_ids, _own(keys, 0), at)
        attended = dropped(attended, dropout(self.attended_dropout, _own(keys, 1)), at)
        x = self.attention_norm(gathered(x, at) + attended)
        down = dropped(self.ffn(x), dropout(self.dropout, _own(keys, 2)), at)
        return self.output_norm(x + down)


class Embeddings(nnx.Module):
    """Words, positions and, in BERT, token types; summed, normalised, dropped out."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        embed = functools.partial(
            Embed, features=config.hidden_size, rngs=rngs, **dtypes,
            embedding_init=nnx.initializers.normal(config.initializer_range),
        )
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size) if config.type_vocab_size else None
        self.norm = _layer_norm(config, dtypes, rngs)
        self.dropout = config.hidden_dropout
        self.position_offset = config.position_offset

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"],
        token_type_ids: Int[Array, "B T"] | None,
        keys: RowKeys,
    ) -> Float[Array, "B T D"]:
        x = self.word(input_ids) + self.position(position_ids + self.position_offset)
        if self.token_type is not None:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(types)
        return dropped(self.norm(x), dropout(self.dropout, keys))


class MLMHead(nnx.Module):
    """The masked-language-model head up to its projection: word embedding, plus this bias."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        self.transform = _linear(config.hidden_size, config.hidden_size, config, dtypes, rngs)
        self.norm = _layer_norm(config, dtypes, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtypes["param_dtype"]))
        self.activation = ACTIVATIONS[config.head_act or config.hidden_act]

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.norm(self.activation(self.transform(hidden)))


class TaskHead(nnx.Module):
    """Logits at some positions: a projection and an activation, but for tags, and a projection."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = None if config.task == "tag" else _linear(width, width, config, dtypes, rngs)
        self.output = _linear(width, config.num_labels, config, dtypes, rngs)
        self.activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[config.pooler_act]
        own = config.hidden_dropout if config.head_dropout is None else config.head_dropout
        self.dropout = config.hidden_dropout if config.task == "tag" else own
        self.input_dropout = own if config.head_input_dropout else 0.0

    def __call__(self, states: Float[Array, "B S D"], keys: RowKeys) -> Float[Array, "B S C"]:
        x = states
        if self.dense is not None:
            x = dropped(x, dropout(self.input_dropout, _own(keys, 0)))
            x = self.activation(self.dense(x))
        x = dropped(x, dropout(self.dropout, _own(keys, 1)))
        return self.output(x).astype(wide(x.dtype))


class SentenceHead(nnx.Module):
    """Vectors of the texts in packed rows: pooled, through linear layers, and to length 1."""

    def __init__(self, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs):
        self.sentence = config.sentence
        self.dense = nnx.List([Linear(
            dense.inputs, dense.outputs, use_bias=dense.bias, rngs=rngs,
            kernel_init=nnx.initializers.normal(dense.inputs**-0.5), **dtypes)
            for dense in config.sentence.dense])

    def __call__(
        self, states: Float[Array, "B _ D"], segment_ids: Int[Array, "B T"], count: int
    ) -> Float[Array, "B S E"]:
        x = pool(self.sentence.pooling, states, segment_ids, count)
        for layer, dense in zip(self.dense, self.sentence.dense, strict=True):
            x = DENSE_ACTIVATIONS[dense.activation](layer(x)).astype(wide(x.dtype))
        return normalized(x) if self.sentence.normalize else x


class Encoder(nnx.Module):
    """BERT or DistilBERT, by `config` (Devlin et al. 2019; Sanh et al. 2019, section 3)."""

    def __init__(
        self, config: EncoderConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs, remat: bool = False,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.remat = remat
        self.embeddings = Embeddings(config, dtypes, rngs)
        self.layers = nnx.List(
            [Layer(config, dtypes, rngs) for _ in range(config.num_hidden_layers)]
        )
        width = config.hidden_size
        self.pooler = _linear(width, width, config, dtypes, rngs) if config.pooler else None
        self.mlm_head = MLMHead(config, dtypes, rngs) if config.mlm_head else None
        self.task_head = TaskHead(config, dtypes, rngs) if config.task else None
        self.sentence_head = SentenceHead(config, dtypes, rngs) if config.sentence else None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"],
        token_type_ids: Int[Array, "B T"] | None = None,
        dropout_keys: RowKeys = None,
        want: tuple[int, ...] = (),
        at: At = None,
        want_qkv: tuple[int, ...] = (),
    ) -> Seen:
        """Compute the last hidden states and, of the layers in `want`, theirs.

        Only keys and values of the last layer need all positions: where its states are wanted at
        a few, the rest of it is computed at those alone.

        Args:
            input_ids: [B, T] token ids.
            segment_ids: [B, T]; 0 on padding, else the number of the document within its row. An
                attention mask of ones and zeros is the case of one document a row.
            position_ids: [B, T] position within the document.
            token_type_ids: [B, T]; zeros if None; a model without token types ignores them.
            dropout_keys: [B] a key for each row, so that what is dropped in it does not depend
                on the rows beside it; None switches dropout off.
            want: numbers of layers, from 1; 0 are the embeddings.
            at: [B, S] positions at which the last states are wanted; None for all. The last
                layer is then not in `want`.
            want_qkv: numbers of layers whose queries, keys and values are wanted, everywhere.

        Returns:
            States [B, T, D], of the last layer [B, S, D], in the compute dtype; those of padding
            mean nothing.
        """
        keys = dropout_keys
        x = self.embeddings(input_ids, position_ids, token_type_ids, _own(keys, 0))
        hidden = {0: x}
        for number, layer in enumerate(self.layers, 1):
            call = jax.checkpoint(layer) if self.remat else layer
            last = number == len(self.layers)
            x = hidden[number] = call(x, segment_ids, _own(keys, number), at if last else None)
        return Seen(x, {number: hidden[number] for number in want},
                    {number: self.layers[number - 1].attention.qkv(hidden[number - 1])
                     for number in want_qkv})

    def mlm_projection(
        self, hidden: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "V D"], Float[Array, " V"]]:
        """What the logits are made of: states in the compute dtype, word embedding, bias."""
        return self.mlm_head(hidden), self.embeddings.word.embedding[...], self.mlm_head.bias[...]

    def mlm_logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of the masked language model, at least float32: [..., D] → [..., V]."""
        states, embedding, bias = self.mlm_projection(hidden)
        logits = jnp.einsum("...D,VD->...V", states, embedding.astype(states.dtype),
                            preferred_element_type=wide(states.dtype))
        return logits + bias.astype(logits.dtype)

    def task_logits(
        self, states: Float[Array, "B S D"], dropout_keys: RowKeys = None
    ) -> Float[Array, "B S C"]:
        """Logits of the task, at least float32.

        Args:
            states: [B, S, D] last states at the positions that are answered: the first one of a
                document, or of a word that is tagged.
            dropout_keys: [B] as for the model; None for none.
        """
        return self.task_head(states, _own(dropout_keys, len(self.layers) + 1))

    def vectors(
        self, states: Float[Array, "B _ D"], segment_ids: Int[Array, "B T"], count: int
    ) -> Float[Array, "B S E"]:
        """The vector of each text of packed rows, at least float32.

        Args:
            states: [B, T, D] last states; where the pooling reads first tokens alone, theirs
                [B, S, D].
            segment_ids: [B, T] which text each position is of.
            count: texts that a row has room for, S.
        """
        return self.sentence_head(states, segment_ids, count)

    def pooled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """BERT's pooler: tanh of a projection of the first position, [B, T, D] → [B, D]."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


def graphdef(
    config: EncoderConfig, dtype: Any, param_dtype: Any = jnp.float32, remat: bool = False
) -> nnx.GraphDef:
    """The structure of the model, to be joined with its parameters by `nnx.merge`.

    With `remat` a layer keeps only its input for the gradient, and is computed again there.
    """
    return nnx.split(_abstract(config, dtype, param_dtype, remat))[0]


def abstract_params(config: EncoderConfig, param_dtype: Any = jnp.float32) -> dict[str, Any]:
    """The nested dict of parameters as ShapeDtypeStructs; nothing is computed."""
    return nnx.to_pure_dict(nnx.split(_abstract(config, param_dtype, param_dtype))[1])


def _abstract(
    config: EncoderConfig, dtype: Any, param_dtype: Any, remat: bool = False
) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(
        config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), remat=remat))


def _own(keys: RowKeys, number: int) -> RowKeys:
    """Keys of the part of the model that has this number among its neighbours."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _linear(
    rows: int, columns: int, config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return Linear(rows, columns, kernel_init=init, rngs=rngs, **dtypes)


class LayerNorm(nnx.LayerNorm):
    """Layer normalization, with its gradient in one kernel where the platform has it."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if not has_triton(x.dtype):
            return super().__call__(x)
        from distilbert_jax.kernels.layer_norm import layer_norm  # slow to import

        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def _layer_norm(config: EncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs,
        **dtypes,
    )
