"""What is known of the Apple Neural Engine: facts with their sources, as data for the lint.

Apple publishes no list of what the Neural Engine runs; an engineer of Core ML Tools says that it "changes based on
device generation, operating system version, tensor sizes etc." (apple/coremltools issue 1780). So each fact here is
either `documented`, that is said by Apple in the source named, or `community-observed`: measured or inferred by others
on their devices. Nothing here was measured by edgekit. `MLComputePlan` on a device is what decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Standing = Literal["documented", "community-observed"]
# off: the op likely leaves the Neural Engine; slow: it likely stays, at a cost; numbers: its answers may be wrong.
Effect = Literal["off", "slow", "numbers"]

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
ALIGNMENT = 64  # bytes of the last axis, see `ARTICLE`
MAX_RANK = 5
IDEAL_RANK = 4
MAX_WIDTH = 16384  # of the last two axes
MAX_CHANNELS = 65536
MAX_KERNEL = 13  # taps of a convolution or pooling along one axis, dilation included


@dataclass(frozen=True)
class Source:
    """Where a fact is said, and by whom."""

    title: str
    address: str
    standing: Standing


ARTICLE = Source(
    "Apple, Deploying Transformers on the Apple Neural Engine (2022)",
    "https://machinelearning.apple.com/research/neural-engine-transformers",
    "documented",
)
# Written for Core AI; it speaks of the same hardware, and of shapes and ops that Core ML's programs have too.
RULES = Source(
    "Apple, Neural Engine Rules (coreai-models, 2026)",
    "https://github.com/apple/coreai-models/blob/86b363dca67cf276c1a5c96eea5e4b57e3a0643c/skills/skills/"
    "model-authoring/references/neural_engine_rules.md",
    "documented",
)
REFERENCE = Source(
    "Apple, ml-ane-transformers",
    "https://github.com/apple/ml-ane-transformers/blob/main/ane_transformers/reference/multihead_attention.py",
    "documented",
)
FLEXIBLE = Source(
    "Core ML Tools guide, Flexible Input Shapes",
    "https://apple.github.io/coremltools/docs-guides/source/flexible-inputs.html",
    "documented",
)
FORUM = Source(
    "an Apple engineer in the Developer Forums, thread 724930",
    "https://developer.apple.com/forums/thread/724930",
    "documented",
)
ISSUE = Source(
    "a Core ML Tools engineer, coremltools issue 1780",
    "https://github.com/apple/coremltools/issues/1780",
    "documented",
)
COMPUTE_PLAN = Source(
    "Apple, MLComputePlan", "https://developer.apple.com/documentation/coreml/mlcomputeplan-1w21n", "documented"
)
HOLLANCE = Source(
    "Hollemans, neural-engine: unsupported layers",
    "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md",
    "community-observed",
)
HOLLANCE_LOG = Source(
    "log messages of a device, hollance/neural-engine issue 2",
    "https://github.com/hollance/neural-engine/issues/2",
    "community-observed",
)
HOLLANCE_16_BIT = Source(
    "Hollemans, neural-engine: is the ANE 16-bit?",
    "https://github.com/hollance/neural-engine/blob/master/docs/16-bit.md",
    "community-observed",
)
GUIDE = Source(
    "ANE guide, model-design rules",
    "https://ane-guide.readthedocs.io/en/latest/part-5-practice/17-model-design-rules.html",
    "community-observed",
)
CATALOG = Source(
    "ANEForge, catalog of MIL ops by chip",
    "https://aneforge.readthedocs.io/en/latest/op-catalog/",
    "community-observed",
)


@dataclass(frozen=True)
class Fact:
    """One rule of the lint.

    Attributes:
        rule: its name.
        effect: see `Effect`.
        says: what the sources say, in one sentence.
        remedy: what to change.
        sources: the first one decides the standing.
        pace: the share of its pace that an op is assumed to keep (1 where it costs nothing). An assumption of edgekit's
            score, not a measurement: it orders advice and says nothing of milliseconds.
        in_layout: whether `--layout ane` does it by itself.
    """

    rule: str
    effect: Effect
    says: str
    remedy: str
    sources: tuple[Source, ...]
    pace: float = 1.0
    in_layout: bool = False

    @property
    def standing(self) -> Standing:
        return self.sources[0].standing

    def advice(self, layout: str) -> str:
        """The remedy for a package of a layout: what `ane` left, only the model's author can change.

        "" is for a model that has no choice of layouts, as language models have none.
        """
        if not self.in_layout:
            return self.remedy
        left = "in the model itself; --layout ane left these"
        how = {"standard": "export with --layout ane", "": "in the model itself"}.get(layout, left)
        return f"{self.remedy}: {how}"


_FACTS = (
    Fact(
        "fp32",
        "off",
        "the Neural Engine computes in fp16; float32 runs on the GPU or the CPU",
        "compute in fp16: export with --precision fp16, or take float32 casts out of the model",
        (RULES, HOLLANCE_16_BIT),
        0.0,
    ),
    Fact(
        "cast",
        "off",
        "a cast between fp16 and fp32 inside the model borders on float32, which leaves the Neural Engine",
        "let the tensors on both sides be fp16",
        (RULES,),
        0.0,
    ),
    Fact(
        "integer",
        "off",
        "the engine's types are fp16, int8 and int16; int32 arithmetic runs elsewhere",
        "compute indices outside the model, or make them constants",
        (RULES, CATALOG),
        0.0,
    ),
    Fact(
        "gather",
        "off",
        "gather does not run there, or on newer chips alone and within narrow limits; the sources differ",
        "slice or split with constant bounds, or look up outside the model",
        (HOLLANCE, CATALOG),
        0.0,
    ),
    Fact(
        "topk",
        "off",
        "topk and sorting have no path on the oldest chips in use and a limited one later",
        "choose outside the model, or as its last step",
        (CATALOG,),
        0.0,
    ),
    Fact(
        "scatter",
        "off",
        "the scatter ops have no path on any chip seen so far",
        "write with masks (a multiplication and an addition), or concatenate",
        (CATALOG,),
        0.0,
    ),
    Fact(
        "dynamic-index",
        "off",
        "a slice whose bounds are computed at run time is no constant descriptor",
        "slice with constant bounds",
        (CATALOG,),
        0.0,
    ),
    Fact(
        "control-flow",
        "off",
        "loops and branches have no code on the engine",
        "unroll the loop, or compute both branches and choose with a mask",
        (CATALOG,),
        0.0,
    ),
    Fact(
        "recurrent",
        "off",
        "RNN, LSTM and GRU are not supported on the Neural Engine",
        "unroll the steps, or use convolution or attention",
        (ISSUE, HOLLANCE, CATALOG),
        0.0,
    ),
    Fact(
        "unsupported-op",
        "off",
        "this op has no path on any chip seen so far",
        "write it with arithmetic that the engine has",
        (CATALOG,),
        0.0,
    ),
    Fact(
        "dynamic-shape",
        "off",
        "with a range of sizes only the default size runs on the Neural Engine; fixed and enumerated sizes do",
        "fix the sizes, or enumerate them: 'NAME:1x3xSxS | S=192/224/256'",
        (FORUM, FLEXIBLE, RULES),
        0.0,
    ),
    Fact(
        "rank",
        "off",
        f"tensors of more than {MAX_RANK} axes are rejected",
        f"reshape to at most {IDEAL_RANK} axes",
        (RULES,),
        0.0,
    ),
    Fact(
        "size",
        "off",
        f"at most {MAX_WIDTH} along each of the last two axes and {MAX_CHANNELS} along the channels",
        "split the tensor, or fold a long axis into two",
        (GUIDE, CATALOG),
        0.0,
    ),
    Fact(
        "kernel",
        "off",
        f"kernels beyond {MAX_KERNEL} taps along one axis, dilation included, were refused; newer chips take more",
        "chain smaller kernels: k1 + k2 - 1 is the field of two",
        (HOLLANCE_LOG, GUIDE, CATALOG),
        0.0,
    ),
    Fact(
        "rank-5",
        "slow",
        "the engine's own format is 4-dimensional and channels-first",
        f"reshape to {IDEAL_RANK} axes: (B, C, 1, S)",
        (ARTICLE,),
        0.8,
    ),
    Fact(
        "narrow-axis",
        "slow",
        f"the last axis is padded to {ALIGNMENT} bytes, 32 elements in fp16: a single one takes 32 times the memory",
        "put the longest axis last",
        (ARTICLE, RULES),
        0.8,
    ),
    Fact(
        "unaligned-axis",
        "slow",
        f"the last axis is aligned to {ALIGNMENT} bytes: its last block is partly padding",
        "let the last axis be a multiple of 32",
        (ARTICLE, RULES),
        0.95,
    ),
    Fact(
        "linear-layout",
        "slow",
        "linear layers on (B, S, C) are decomposed into slower ops and may leave the engine",
        "use 1x1 convolutions on (B, C, 1, S)",
        (ARTICLE, RULES),
        0.7,
        in_layout=True,
    ),
    Fact(
        "fused-attention",
        "slow",
        "the engine has no fused attention; one head after the other makes smaller tensors",
        "split the heads",
        (RULES, ARTICLE, REFERENCE),
        0.8,
        in_layout=True,
    ),
    Fact(
        "attention-heads",
        "slow",
        "batched products of all heads at once make large tensors; a list of single heads stays in the cache",
        "split the heads (einsum bchq,bkhc->bkhq)",
        (ARTICLE, REFERENCE),
        0.85,
        in_layout=True,
    ),
    Fact(
        "stride",
        "slow",
        "strides with prime factors other than 2 and 3 cost extra; pooling strides are best 2 or 4",
        "use a stride of 1, 2, 4, 6, 8, 9 or 12, or for pooling 2 or 4",
        (RULES,),
        0.8,
    ),
    Fact(
        "dilation",
        "slow",
        "large dilations are costly, and older chips refused dilated convolutions",
        "chain dilations of 2 and 3",
        (RULES, HOLLANCE),
        0.8,
    ),
    Fact(
        "spatial-softmax",
        "slow",
        "softmax along height or width keeps the compiler from splitting the work there",
        "let softmax run along the channels (axis 1 of four)",
        (RULES,),
        0.9,
    ),
    Fact(
        "infinite-mask",
        "numbers",
        "the engine does not treat minus infinity in softmax as IEEE does",
        "mask with -40000 instead",
        (RULES,),
    ),
)
FACTS: Mapping[str, Fact] = {fact.rule: fact for fact in _FACTS}

# By op type, where the type alone decides.
OP_RULES: Mapping[str, str] = {
    **dict.fromkeys(("gather", "gather_along_axis", "gather_nd"), "gather"),
    **dict.fromkeys(("topk", "argsort"), "topk"),
    **dict.fromkeys(("scatter", "scatter_along_axis", "scatter_nd"), "scatter"),
    **dict.fromkeys(("while_loop", "cond"), "control-flow"),
    **dict.fromkeys(("lstm", "gru", "rnn"), "recurrent"),
    **dict.fromkeys(
        (
            "acos", "acosh", "asin", "asinh", "atanh", "band_part", "constexpr_cast", "cosh", "list_gather",
            "list_length", "list_read", "list_scatter", "list_write", "logical_and", "logical_or", "logical_xor",
            "make_list", "mod", "non_zero", "one_hot", "random_bernoulli", "random_categorical", "random_normal",
            "random_uniform", "range_1d", "reduce_prod", "reverse_sequence", "shape", "sinh", "sliding_windows", "tan",
        ),
        "unsupported-op",
    ),
}  # fmt: skip

# They compute nothing: a copy at most, and none where the layout lets the compiler leave it out.
MOVING_OPS = frozenset(
    (
        "concat", "expand_dims", "reshape", "reverse", "slice_by_index", "slice_by_size", "split", "squeeze", "stack",
        "tile", "transpose",
    )
)  # fmt: skip
