"""How far a bundle's outputs may lie from PyTorch's: one table, read by `verify` and by every test.

The measure is the relative L2 error ||actual - reference|| / ||reference||, which does not depend on the scale of the
outputs. Figures per row: where they come from.

fp32   The two runtimes order their sums differently; the zoo measures up to 7e-7. 1e-5 is the golden bound.
fp16   Eleven bits of mantissa give about 5e-4 per rounding; the zoo measures 2e-4 to 1.2e-3, its worst layer 1.8e-3.
int8   Eight bits for activations and weights; the zoo measures 0.03 to 0.06, its worst layer 0.25. The bound catches a
       broken graph only: what int8 costs is told by the task's accuracy, which `verify --data` measures.
"""

from __future__ import annotations

from edgekit.errors import UnknownNameError

PRECISIONS = ("fp32", "fp16", "int8")

OUTPUT_REL_L2: dict[str, float] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.25}

# One layer may lie further off than the outputs: small activations are relative to a small norm, and errors of a layer
# in the middle average out in the classifier.
LAYER_REL_L2: dict[str, float] = {"fp32": 5e-5, "fp16": 5e-3, "int8": 0.35}


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
