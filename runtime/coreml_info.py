"""What a bundle for Core ML says of its package: the systems that run it, its functions, and its states."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from edgekit.runtime.generation_info import Plain
from edgekit.runtime.json_fields import Fields

# The package's files inside a bundle, and what they are for (their roles in the manifest).
PACKAGE = "model.mlpackage"
ITEM_INFO = f"{PACKAGE}/Manifest.json"  # role `package`
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"  # role `model`
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"  # role `weights`; absent where a model has none
CHECK = "check_on_mac.py"  # role `tool`

# Deployment targets, oldest first, with the specification version that Core ML Tools writes for each.
SPECIFICATIONS = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
LAYOUTS = ("standard", "ane")
COMPUTE_PRECISIONS = ("fp16", "fp32")
_COMPRESSION_FACTS = 64
_STATE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class StateSpec:
    """A state that the package keeps between runs, and the tensors of the manifest that stand for it.

    Args:
        name: the state's name in the package.
        dtype, shape: of the state; sizes are fixed.
        input: the input that the session puts into the state before a run.
        output: the output that the session reads out of the state after a run.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    input: str
    output: str


@dataclass(frozen=True)
class CoreMLInfo:
    """The facts of a Core ML package that a runtime needs, or a user wants to see.

    Args:
        deployment_target: the oldest system that runs it: `iOS16`, `iOS17` or `iOS18`.
        specification_version: of the package's format.
        function: the function of the package that the manifest's tensors describe.
        functions: all functions of the package.
        layout: `standard`, or `ane` where the graph was rewritten for the Neural Engine's layout.
        compute_precision: what activations are computed in, `fp16` or `fp32`.
        image_input: the input that is an image, None where all are arrays.
        input_dtypes: what PyTorch takes for inputs whose dtype Core ML has not, by name: `int64` where the manifest
            says `int32`.
        label_outputs: the outputs that a package with class labels has besides the manifest's: the likeliest class's
            label, and a dictionary from labels to probabilities.
        states: the states of the function, in its order; empty for a stateless one.
        compression: how weights are stored, for display, such as `{"weights": "int8", "granularity": "per_channel"}`.
    """

    deployment_target: str
    specification_version: int
    function: str = "main"
    functions: tuple[str, ...] = ("main",)
    layout: str = "standard"
    compute_precision: str = "fp16"
    image_input: str | None = None
    input_dtypes: dict[str, str] = field(default_factory=dict)
    label_outputs: tuple[str, ...] = ()
    states: tuple[StateSpec, ...] = ()
    compression: dict[str, Plain] = field(default_factory=dict)


def mac_command(bundle: Path) -> str:
    """What to type on a Mac to check a bundle there; a packed one is unpacked first."""
    path = bundle
    unpack = ""
    if path.suffix == ".zip":
        path = bundle.with_suffix("")
        unpack = f"unzip -n {quote(str(bundle))} -d {quote(str(path))} && "
    return f"{unpack}python3 {quote(str(path / CHECK))}"


def read_coreml(fields: Fields, value: object) -> CoreMLInfo:
    """The field `coreml` of a manifest. Raises `BundleError` where a value is not what `CoreMLInfo` says."""
    prefix = "coreml."
    data = fields.record(value, CoreMLInfo, prefix)

    def one_of(key: str, choices: tuple[str, ...]) -> str:
        text = fields.text(data[key], prefix + key)
        if text not in choices:
            raise fields.bad(prefix + key, f"one of {', '.join(choices)}", text)
        return text

    functions = fields.strings(data["functions"], f"{prefix}functions")
    compression = fields.get(data, "compression", dict, prefix)
    for key, item in compression.items():
        if not isinstance(item, str | int | float | bool):
            raise fields.bad(f"{prefix}compression.{key}", "a text, a number, true or false", item)
    if len(compression) > _COMPRESSION_FACTS:
        raise fields.bad(f"{prefix}compression", f"at most {_COMPRESSION_FACTS} facts", sorted(compression))
    states = fields.get(data, "states", list, prefix)
    return CoreMLInfo(
        deployment_target=one_of("deployment_target", tuple(SPECIFICATIONS)),
        specification_version=fields.count(data["specification_version"], f"{prefix}specification_version", least=1),
        function=one_of("function", functions),
        functions=functions,
        layout=one_of("layout", LAYOUTS),
        compute_precision=one_of("compute_precision", COMPUTE_PRECISIONS),
        image_input=fields.optional(data, "image_input", fields.text, prefix),
        input_dtypes={
            name: _torch_dtype(fields, dtype, f"{prefix}input_dtypes.{name}")
            for name, dtype in fields.get(data, "input_dtypes", dict, prefix).items()
        },
        label_outputs=fields.strings(data["label_outputs"], f"{prefix}label_outputs"),
        states=tuple(_state(fields, item, f"{prefix}states[{index}].") for index, item in enumerate(states)),
        compression=compression,
    )


def _torch_dtype(fields: Fields, value: object, path: str) -> str:
    if value != "int64":
        raise fields.bad(path, "'int64'", value)
    return "int64"


def _state(fields: Fields, value: object, prefix: str) -> StateSpec:
    data = fields.record(value, StateSpec, prefix)
    dtype = fields.text(data["dtype"], f"{prefix}dtype")
    if dtype not in _STATE_DTYPES:
        raise fields.bad(f"{prefix}dtype", f"one of {', '.join(_STATE_DTYPES)}", dtype)
    shape = tuple(fields.count(size, f"{prefix}shape") for size in fields.get(data, "shape", list, prefix))
    name, given, read = (fields.text(data[key], prefix + key) for key in ("name", "input", "output"))
    return StateSpec(name, dtype, shape, given, read)
