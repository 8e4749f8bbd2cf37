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

Targets differ: a Core ML package has weights of few bits and computes in fp16, so that its rows are its own. They are
measured on the reference runtime, which rounds as fp16 does and adds up in fp32; Apple's runtime was never at hand.
"""

from __future__ import annotations

from edgekit.errors import InputError, UnknownNameError

# What each target is exported in; the first is its default.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "tvm": ("fp32",),
    "coreml": ("fp16", "fp32", "int8", "int4", "palette4", "palette6", "palette8"),
}

OUTPUT_REL_L2: dict[str, float] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.25, "int4": 0.1}

# One layer may lie further off than the outputs: small activations are relative to a small norm, and errors of a layer
# in the middle average out in the classifier.
LAYER_REL_L2: dict[str, float] = {"fp32": 5e-5, "fp16": 5e-3, "int8": 0.35, "int4": 0.2}

# Logits of int4 against PyTorch's with the weights as they were before: 0.04 for dhsa_bytes, 0.18 for random ones of
# two layers. It catches a broken export only: what four bits cost is told by the share of equal next tokens, beside it.
INT4_LOGITS_REL_L2 = 0.5

# Core ML, weights of few bits and activations of fp16; the rows above hold for what is not here.
# The zoo's digits models measure 0.01 (int8), 0.12 (int4), 0.15, 0.05 and 0.02 (palettes): these catch broken weights
# alone. Before its weights lose bits each export is held to fp16's row; the accuracy tells what the bits cost.
COREML_OUTPUT_REL_L2 = {"int8": 0.05, "int4": 0.4, "palette4": 0.4, "palette6": 0.15, "palette8": 0.05}
COREML_LAYER_REL_L2 = {"int8": 0.1, "int4": 0.6, "palette4": 0.6, "palette6": 0.3, "palette8": 0.1}


def default_precision(target: str) -> str:
    """What `target` is exported in where nothing is said. Its bundles do not carry it in their names."""
    return PRECISIONS.get(target, ("fp32",))[0]


def check_precision(target: str, precision: str) -> None:
    """Whether `target` is exported in `precision`.

    Raises:
        UnknownNameError: no target is.
        InputError: others are.
    """
    known = list(dict.fromkeys(name for names in PRECISIONS.values() for name in names))
    if precision not in known:
        raise UnknownNameError("precision", precision, known)
    if precision in PRECISIONS[target]:
        return
    if target == "tvm":
        raise InputError(f"the target tvm computes in fp32; for {precision}, export to onnx")
    raise InputError(f"the target {target} is exported as {', '.join(PRECISIONS[target])}, not as {precision}")


def output_tolerance(precision: str, target: str = "onnx") -> float:
    """The largest relative L2 error of an output that passes at `precision`."""
    return _row(OUTPUT_REL_L2, COREML_OUTPUT_REL_L2, precision, target)


def layer_tolerance(precision: str, target: str = "onnx") -> float:
    """The largest relative L2 error of an inner layer that passes at `precision`."""
    return _row(LAYER_REL_L2, COREML_LAYER_REL_L2, precision, target)


def _row(table: dict[str, float], coreml: dict[str, float], precision: str, target: str) -> float:
    rows = table | coreml if target == "coreml" else table
    if precision not in rows:
        raise UnknownNameError("precision", precision, rows)
    return rows[precision]
