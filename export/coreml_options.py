"""What a user may choose of a Core ML package, and which choices go together. Needs no Core ML Tools."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import InputError, UnknownNameError
from edgekit.runtime.coreml_info import LAYOUTS, SPECIFICATIONS

INPUTS = ("image", "tensor")

# The least system whose Core ML reads weights of a precision; those that are not here are read by all of them.
# Core ML Tools' guide, "Quantization overview": blocks of int4 came with iOS 18.
_LEAST = {"int4": "iOS18"}
_OLDEST = "iOS16"


@dataclass(frozen=True)
class CoreMLOptions:
    """What to make.

    Args:
        precision: as for `edgekit.export`.
        deployment_target: `iOS16`, `iOS17` or `iOS18`.
        layout: `standard` or `ane`.
        input: `image`, `tensor`, or None: an image where the preprocessing allows.
        chosen: whether the caller named the deployment target.
    """

    precision: str
    deployment_target: str
    layout: str
    input: str | None
    chosen: bool

    @property
    def compute_precision(self) -> str:
        """What activations are computed in: `fp16`, unless `fp32` was asked for."""
        return "fp32" if self.precision == "fp32" else "fp16"


def coreml_options(
    precision: str, deployment_target: str | None = None, layout: str = "standard", input_kind: str | None = None
) -> CoreMLOptions:
    """The options, checked; without a deployment target the oldest that `precision` allows.

    Raises:
        UnknownNameError: a deployment target, layout or kind of input that there is not.
        InputError: a deployment target that is too old for the precision.
    """
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if input_kind is not None and input_kind not in INPUTS:
        raise UnknownNameError("kind of input", input_kind, INPUTS)
    if deployment_target is not None and deployment_target not in SPECIFICATIONS:
        raise UnknownNameError("deployment target", deployment_target, SPECIFICATIONS)
    least = _LEAST.get(precision, _OLDEST)
    chosen = deployment_target or least
    require(chosen, least, f"the precision {precision}")
    return CoreMLOptions(precision, chosen, layout, input_kind, deployment_target is not None)


def require(deployment_target: str, least: str, what: str) -> None:
    """Raise `InputError` unless `deployment_target` is `least` or newer, which `what` needs."""
    if SPECIFICATIONS[deployment_target] < SPECIFICATIONS[least]:
        raise InputError(
            f"{what} needs a deployment target of at least {least}, and {deployment_target} was asked for; choose "
            f"{least}, or leave it out"
        )
