"""How far a bundle's outputs may lie from PyTorch's: one table, read by `verify` and by every test.

The measure is the relative L2 error ||actual - reference|| / ||reference||, which does not depend on the scale of the
outputs. Figures per row: where they come from.

fp32   The two runtimes order their sums differently; the zoo measures up to 7e-7. 1e-5 is the golden bound.
fp16   Eleven bits of mantissa give about 5e-4 per rounding; the zoo measures 2e-4 to 1.2e-3, its worst layer 1.8e-3.
int8   Eight bits for activations and weights; the zoo measures 0.03 to 0.06, its worst layer 0.25. The bound catches a
       broken graph only: what int8 costs is told by the task's accuracy, which `verify --data` measures.
int4   Against PyTorch with the same weights, those that the four bits stand for: what is left is the rounding of
       activations to eight bits in the products, 0.004 to 0.009 for dhsa_bytes, up to 0.012 for random decoders of two
       layers, and more in deeper ones. With products in fp32 the row fp32 holds (3e-7), and `verify` with the model at
       hand asks for that, too.
"""

from __future__ import annotations

from edgekit.errors import UnknownNameError

PRECISIONS = ("fp32", "fp16", "int8", "int4")

OUTPUT_REL_L2: dict[str, float] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.25, "int4": 0.1}

# One layer may lie further off than the outputs: small activations are relative to a small norm, and errors of a layer
# in the middle average out in the classifier.
LAYER_REL_L2: dict[str, float] = {"fp32": 5e-5, "fp16": 5e-3, "int8": 0.35, "int4": 0.2}

# Logits of int4 against PyTorch's with the weights as they were before: 0.04 for dhsa_bytes, 0.18 for random ones of
# two layers. It catches a broken export only: what four bits cost is told by the share of equal next tokens, beside it.
INT4_LOGITS_REL_L2 = 0.5


def output_tolerance(precision: str) -> float:
    """The largest relative L2 error of an output that passes at `precision`."""
    if precision not in OUTPUT_REL_L2:
        raise UnknownNameError("precision", precision, OUTPUT_REL_L2)
    return OUTPUT_REL_L2[precision]


def layer_tolerance(precision: str) -> float:
    """The largest relative L2 error of an inner layer that passes at `precision`."""
    if precision not in LAYER_REL_L2:
        raise UnknownNameError("precision", precision, LAYER_REL_L2)
    return LAYER_REL_L2[precision]
