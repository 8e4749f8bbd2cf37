"""What distinguishes one decoder-only language model from another: the configuration of `edgekit.models.decoder`.

The three families share a skeleton. Gemma 2 (arXiv 2408.00118) normalises before and after each half of a block, caps
its scores and slides on every other layer; Llama 3 (arXiv 2407.21783) has none of this; Qwen2 (arXiv 2407.10671) is
Llama with biases on queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from edgekit.errors import InputError
from edgekit.models.layers import check_sizes
from edgekit.models.sparse_attention import SparseAttention

Family = Literal["gemma2", "llama", "qwen2"]
Activation = Literal["silu", "gelu_pytorch_tanh"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class RopeScaling:
    """The stretched rotary frequencies of Llama 3.1, `rope_type: llama3`.

    Wavelengths beyond `original_context / low_frequency` tokens grow by `factor`, those under
    `original_context / high_frequency` stay, and between them the factor is blended in.

    Raises:
        InputError: a factor or a context below 1, or frequencies that are not 0 < low < high.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.original_context >= 1 and 0 < self.low_frequency < self.high_frequency):
            raise InputError(
                "rotary positions are stretched by a factor of at least 1, from an original context of at least 1 "
                f"token, with 0 < low < high frequency; got factor {self.factor:g}, context {self.original_context}, "
                f"frequencies {self.low_frequency:g} and {self.high_frequency:g}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and choices of a decoder. Making one checks that they fit together.

    Attributes:
        rope_theta: base of the rotary position embedding.
        query_scale: factor of the attention scores.
        attention_softcap, final_softcap: caps of the scores and of the logits, 0 for none.
        sliding_window: a sliding layer's tokens see so many tokens, themselves included; 0 for none.
        sliding_layers: for each layer whether it slides; empty where none does.
        attention_bias, output_bias, mlp_bias: of queries, keys and values; of the attention's output; of the MLP.
        tied: the logits' matrix is the embedding's.
        embedding_scale: factor of the embeddings.
        context: tokens that the model takes, cached ones included.
        bos, eos, pad: token ids; any token of `eos` ends a text.

    Raises:
        ShapeError: a size below one.
        InputError: another mismatch.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    query_scale: float
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    embedding_scale: float = 1.0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    attention: SparseAttention = field(default_factory=lambda: SparseAttention(kind="dense"))

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"a decoder is of family {', '.join(FAMILIES)}; got {self.family!r}")
        check_sizes(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            context=self.context,
        )
        if self.activation not in get_args(Activation):
            raise InputError(f"activation is {' or '.join(get_args(Activation))}; got {self.activation!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even, for rotary positions; got {self.head_dim}")
        for name in ("query_scale", "rope_theta", "embedding_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("attention_softcap", "final_softcap", "norm_eps"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.sliding_window < 0:
            raise InputError(f"sliding_window must be at least 0 (0 for none); got {self.sliding_window}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise InputError(
                f"sliding_layers names each of the {self.num_layers} layers; got {len(self.sliding_layers)} entries"
            )
        if any(self.sliding_layers) and not self.sliding_window:
            raise InputError("sliding layers need a sliding_window of at least 1; got 0")

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0 for all before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else 0

    @staticmethod
    def from_huggingface(
        config: Mapping[str, Any], *, attention: SparseAttention | None = None, context: int | None = None
    ) -> DecoderConfig:
        """The configuration that a `config.json` of Hugging Face's states, of model_type gemma2, llama or qwen2.

        Both spellings of the rotary embedding are read: `rope_theta` with `rope_scaling`, and `rope_parameters`, as
        transformers 5 writes it.

        Args:
            config: the JSON object.
            attention: dense where None.
            context: tokens to take; `max_position_embeddings` where None.

        Raises:
            InputError: another architecture, a variant that the decoder does not have, or an entry that is missing or
                of the wrong kind.
        """
        return _from_huggingface(_Entries(config), attention or SparseAttention(kind="dense"), context)


class _Entries:
    """Typed look-ups in a config.json. null counts as missing, as transformers counts it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refusal(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._refusal(name, "a number", value)
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._refusal(name, "true or false", value)
        return value

    def token(self, name: str) -> int | None:
        tokens = self.tokens(name)
        return tokens[0] if tokens else None

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise self._refusal(name, "a token id or a list of them", value)
        return tuple(listed)

    def entries(self, name: str) -> _Entries | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._refusal(name, "an object", value)
        return _Entries(value)

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is None and default is None:
            raise InputError(f"the configuration has no {name}; take the config.json that belongs to the weights")
        return default if value is None else value

    def _refusal(self, name: str, wanted: str, value: object) -> InputError:
        return InputError(f"{name} in the configuration must be {wanted}; got {value!r}")


def _from_huggingface(entries: _Entries, attention: SparseAttention, context: int | None) -> DecoderConfig:
    family = entries.values.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"the decoder reads model_type {', '.join(FAMILIES)}; got {family!r}")
    _refuse_variants(entries)
    gemma = family == "gemma2"
    hidden, heads, layers = (
        entries.integer(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    for name, size in (("hidden_size", hidden), ("num_attention_heads", heads)):
        if size < 1:
            raise InputError(f"{name} in the configuration must be at least 1; got {size}")
    head_dim = entries.integer("head_dim", 256 if gemma else hidden // heads)
    query = entries.number("query_pre_attn_scalar", 256) if gemma else head_dim
    if query <= 0:
        name = "query_pre_attn_scalar" if gemma else "head_dim"
        raise InputError(f"{name} in the configuration must be above 0; got {query:g}")
    window, sliding = _sliding(entries, family, layers)
    theta, scaling = _rope(entries)
    bias = entries.switch("attention_bias", default=False)
    return DecoderConfig(
        family=family,
        vocab_size=entries.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=entries.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=entries.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context=entries.integer("max_position_embeddings") if context is None else context,
        query_scale=query**-0.5,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=entries.number("rms_norm_eps", 1e-6),
        activation=_activation(entries, gemma),
        attention_softcap=_softcap(entries, "attn_logit_softcapping", gemma),
        final_softcap=_softcap(entries, "final_logit_softcapping", gemma),
        sliding_window=window,
        sliding_layers=sliding,
        attention_bias=True if family == "qwen2" else bias,
        output_bias=False if family == "qwen2" else bias,
        mlp_bias=entries.switch("mlp_bias", default=False) if family == "llama" else False,
        tied=entries.switch("tie_word_embeddings", default=gemma),
        embedding_scale=hidden**0.5 if gemma else 1.0,
        bos=entries.token("bos_token_id"),
        eos=entries.tokens("eos_token_id"),
        pad=entries.token("pad_token_id"),
        attention=attention,
    )


def _refuse_variants(entries: _Entries) -> None:
    if entries.values.get("quantization_config"):
        raise InputError("the configuration says that the weights are quantised; take the unquantised checkpoint")
    if entries.values.get("use_bidirectional_attention"):
        raise InputError("the configuration asks for bidirectional attention; the decoder is causal")


def _activation(entries: _Entries, gemma: bool) -> Activation:
    default = "gelu_pytorch_tanh" if gemma else "silu"
    name = entries.values.get("hidden_activation" if gemma else "hidden_act") or default
    if name not in get_args(Activation):
        raise InputError(f"the decoder has the activations {', '.join(get_args(Activation))}; got {name!r}")
    return cast(Activation, name)


def _softcap(entries: _Entries, name: str, gemma: bool) -> float:
    """A cap that the file does not mention has Gemma's default; one that is null is none."""
    if not gemma or (name in entries.values and entries.values[name] is None):
        return 0.0
    return entries.number(name, 50.0 if name.startswith("attn") else 30.0)


def _sliding(entries: _Entries, family: str, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers slide. Gemma 2: even ones; Qwen2: the last ones, where it is switched on."""
    if family == "llama" or (family == "qwen2" and not entries.switch("use_sliding_window", default=False)):
        return 0, ()
    if "sliding_window" in entries.values and entries.values["sliding_window"] is None:
        return 0, ()
    window = entries.integer("sliding_window", 4096)
    types = entries.values.get("layer_types")
    if types is not None:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
            raise InputError(f"layer_types must name {', '.join(known)} for each of {layers} layers; got {types!r}")
        sliding = tuple(known[kind] for kind in types)
    elif family == "gemma2":
        sliding = tuple(layer % 2 == 0 for layer in range(layers))
    else:
        first = entries.integer("max_window_layers", 28)
        sliding = tuple(layer >= first for layer in range(layers))
    return (window, sliding) if any(sliding) else (0, ())


def _rope(entries: _Entries) -> tuple[float, RopeScaling | None]:
    new = entries.entries("rope_parameters")
    old = entries.entries("rope_scaling")
    scaling = new or old
    theta = entries.number("rope_theta", 10_000.0) if new is None else new.number("rope_theta", 10_000.0)
    if scaling is None:
        return theta, None
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"the decoder scales rotary positions as default or llama3; got rope type {kind!r}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"the decoder rotates whole heads; got partial_rotary_factor {scaling.values['partial_rotary_factor']}"
        )
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=scaling.number("factor"),
        low_frequency=scaling.number("low_freq_factor"),
        high_frequency=scaling.number("high_freq_factor"),
        original_context=scaling.integer("original_max_position_embeddings"),
    )
