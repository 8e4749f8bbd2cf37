"""What a language model's bundle says of itself for generating text: its limits, its attention and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekit.runtime.json_fields import Fields

Plain = str | int | float | bool

TOKENIZERS = ("bytes", "huggingface")
_BYTES = 256
_ATTENTION_OPTIONS = 64


@dataclass(frozen=True)
class TokenizerInfo:
    """How text becomes token ids.

    Args:
        kind: `bytes` (the ids below 256 are the bytes of UTF-8 text) or `huggingface` (a `tokenizer.json`).
        file: the bundle's file that holds the tokenizer; None for bytes.
        vocab_size: how many token ids the model knows, 0..vocab_size-1; a tokenizer may use fewer.
        bos: the id that begins a text, None where there is none.
        eos: the ids that end a text, possibly none.
        pad: the id for filling up, None where there is none.
        add_bos: whether a prompt begins with `bos`.
    """

    kind: str
    file: str | None
    vocab_size: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    add_bos: bool = False


@dataclass(frozen=True)
class Generation:
    """What generating text needs to know of a model, besides its two graphs.

    Args:
        context: how many tokens one text may have, prompt and answer together.
        layers: how many layers keep keys and values of earlier tokens.
        block_size: all passes over a prompt but its last have a multiple of so many tokens.
        pass_tokens: how many tokens one pass over a prompt takes unless memory asks for fewer.
        attention: how the model attends, for display: `kind`, `budget` and so on.
        tokenizer: how text becomes token ids.
    """

    context: int
    layers: int
    block_size: int
    pass_tokens: int
    tokenizer: TokenizerInfo
    attention: dict[str, Plain] = field(default_factory=dict)


def tensor_names(layers: int, *, states: bool = False) -> dict[str, list[str]]:
    """The tensors that both graphs of a language model with so many caching layers have, for `inputs` and `outputs`.

    The names are those that onnxruntime-genai uses. With `states`, of a package for Core ML, a number says how many
    tokens count, and there is no mask.
    """
    past, present = (
        [f"{stem}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        for stem in ("past_key_values", "present")
    )
    mask = [] if states else ["attention_mask"]
    return {"inputs": ["input_ids", *mask, *past], "outputs": ["logits", *present]}


def read_generation(fields: Fields, value: object, roles: Mapping[str, str]) -> Generation:
    """The field `generation` of a manifest; `roles` says what each of the bundle's files is for.

    Raises `BundleError` where a value is not what `Generation` says.
    """
    prefix = "generation."
    data = fields.record(value, Generation, prefix)
    context, layers, block_size, pass_tokens = (
        fields.count(data[key], prefix + key, least=1) for key in ("context", "layers", "block_size", "pass_tokens")
    )
    if pass_tokens % block_size:
        raise fields.bad(f"{prefix}pass_tokens", f"a multiple of the block size, {block_size}", pass_tokens)
    attention = fields.get(data, "attention", dict, prefix)
    for key, item in attention.items():
        if not isinstance(item, str | int | float | bool):
            raise fields.bad(f"{prefix}attention.{key}", "a text, a number, true or false", item)
    if len(attention) > _ATTENTION_OPTIONS:
        raise fields.bad(f"{prefix}attention", f"at most {_ATTENTION_OPTIONS} options", sorted(attention))
    tokenizer = _read_tokenizer(fields, data["tokenizer"], roles)
    return Generation(context, layers, block_size, pass_tokens, tokenizer, attention)


def _read_tokenizer(fields: Fields, value: object, roles: Mapping[str, str]) -> TokenizerInfo:
    prefix = "generation.tokenizer."
    data = fields.record(value, TokenizerInfo, prefix)
    kind = fields.text(data["kind"], f"{prefix}kind")
    if kind not in TOKENIZERS:
        raise fields.bad(f"{prefix}kind", f"one of {', '.join(TOKENIZERS)}", kind)
    file = fields.optional(data, "file", fields.text, prefix)
    if kind == "bytes" and file is not None:
        raise fields.bad(f"{prefix}file", "null for bytes", file)
    if kind == "huggingface" and (file is None or roles.get(file) != "tokenizer"):
        raise fields.bad(f"{prefix}file", "a file with the role 'tokenizer'", file)
    vocab_size = fields.count(data["vocab_size"], f"{prefix}vocab_size", least=_BYTES if kind == "bytes" else 1)

    def token(number: object, path: str) -> int:
        if fields.count(number, path) >= vocab_size:
            raise fields.bad(path, f"a token id below the vocabulary's size, {vocab_size}", number)
        return fields.integer(number, path)

    bos = fields.optional(data, "bos", token, prefix)
    add_bos = fields.flag(data["add_bos"], f"{prefix}add_bos")
    if add_bos and bos is None:
        raise fields.bad(f"{prefix}add_bos", "false where there is no bos", add_bos)
    return TokenizerInfo(
        kind=kind,
        file=file,
        vocab_size=vocab_size,
        bos=bos,
        eos=tuple(token(item, f"{prefix}eos") for item in fields.get(data, "eos", list, prefix)),
        pad=fields.optional(data, "pad", token, prefix),
        add_bos=add_bos,
    )
