"""Programs that no converter writes: whatever stands in a file, what comes out is a result or an error of ours."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BundleError, EdgekitError, InputError
from edgekit.runtime.mil import MilInterpreter, interpreter, load_program
from edgekit.runtime.mil.loading import import_proto

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

X = np.linspace(-1, 1, 3 * 36, dtype=np.float32).reshape(1, 3, 6, 6)


def everything(mb: Any, x: Any, s: Any) -> Any:
    """Ops of every kind that the interpreter treats in a way of its own."""
    from coremltools.converters.mil.mil import types

    y = mb.conv(x=x, weight=X.reshape(3, 3, 12)[:, :, :9].reshape(3, 3, 3, 3), pad_type="same", name="y")
    y = mb.layer_norm(x=mb.relu(x=y, name="positive"), axes=[-1], epsilon=np.float32(1e-5), name="even")
    y = mb.reduce_mean(x=y, axes=[2, 3], keep_dims=False, name="mean")
    held = mb.add(x=mb.cast(x=y, dtype="fp16", name="half"), y=mb.read_state(input=s, name="old"), name="new")
    mb.coreml_update_state(state=s, value=held)

    def more(i: Any, v: Any) -> Any:
        return mb.less(x=i, y=np.int32(3), name="more")

    def body(i: Any, v: Any) -> Any:
        return mb.add(x=i, y=np.int32(1), name="next"), mb.mul(x=v, y=np.float32(2), name="twice")

    _, y = mb.while_loop(_cond=more, _body=body, loop_vars=(np.int32(0), y), name="loop")
    positive = mb.greater(x=mb.reduce_sum(x=y, keep_dims=False, name="sum"), y=np.float32(0), name="positive_sum")
    up, down = (lambda: mb.add(x=y, y=np.float32(1), name="up")), (lambda: mb.sub(x=y, y=np.float32(1), name="down"))
    y = mb.cond(pred=positive, _true_fn=up, _false_fn=down, name="either")
    best, _ = mb.topk(x=y, k=2, axis=1, name="best")
    weight = mb.constexpr_blockwise_shift_scale(
        data=np.ones((8, 3), np.int8), scale=np.full((8, 1), 0.5, types.nptype_from_builtin(types.fp32)), name="weight"
    )
    z = mb.gather(x=mb.linear(x=y, weight=weight, name="z"), indices=np.array([1, 2], np.int32), axis=1, name="some")
    return mb.concat(values=[z, best], axis=1, name="out")


@pytest.fixture(scope="module")
def package(write_package) -> Path:
    specs = {"x": ("fp32", X.shape), "s": ("fp16", (1, 3), "state")}
    return write_package({"main": (specs, everything)}, "iOS18")


@pytest.fixture
def edit(package, tmp_path) -> Callable[[Callable[[Any], None]], Path]:
    """Write a copy of the package whose program a function has changed."""
    copy = Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))
    model = package / "Data" / "com.apple.CoreML" / "model.mlmodel"

    def write(change: Callable[[Any], None]) -> Path:
        spec = import_proto().Model_pb2.Model()
        spec.ParseFromString(model.read_bytes())
        change(spec.mlProgram)
        (copy / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(spec.SerializeToString())
        return copy

    return write


def run(package: Path) -> dict[str, Any]:
    made = MilInterpreter(load_program(package))
    shapes = {v.name: [size or 1 for size in v.type.shape] if v.type.elements < 10**6 else [1] for v in made.inputs}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return made.run(zeros | ({"x": X} if "x" in zeros else {}))


def op(program: Any, op_type: str) -> Any:
    function = program.functions["main"]
    return next(op for op in function.block_specializations[function.opset].operations if op.type == op_type)


def body(program: Any) -> Any:
    function = program.functions["main"]
    return function.block_specializations[function.opset]


def _to_the_state(program: Any) -> None:
    op(program, "relu").inputs["x"].arguments[0].name = "s"


def _state_as_output(program: Any) -> None:
    body(program).outputs[0] = "s"


def _no_data(program: Any) -> None:
    del op(program, "write_state").inputs["data"]


def _result_of_a_write(program: Any) -> None:
    op(program, "write_state").outputs.add().CopyFrom(op(program, "read_state").outputs[0])


def _condition_of_several(program: Any) -> None:
    op(program, "cond").inputs["pred"].arguments[0].name = "mean"


def _string_without_text(program: Any) -> None:
    for each in body(program).operations:
        if each.type == "const" and each.attributes["val"].immediateValue.tensor.WhichOneof("value") == "strings":
            del each.attributes["val"].immediateValue.tensor.strings.values[:]


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        (_to_the_state, "takes the state 's', which only read_state and write_state may", BundleError),
        (_state_as_output, "the output 's' of main is a state, not its value", BundleError),
        (_no_data, "write_state of the state 's' lacks its data", BundleError),
        (_result_of_a_write, "write_state of the state 's' lacks its data or its result", BundleError),
        (_condition_of_several, "cond of 'either': its condition is no single value", InputError),
        (_string_without_text, "does not fit its type string.*it holds 0 strings", BundleError),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) and value not in (BundleError, InputError) else "",
)
def test_what_does_not_fit_together(edit, change, message, kind):
    with pytest.raises(kind, match=message):
        run(edit(change))


def test_a_loop_without_end(edit, monkeypatch):
    def forever(program: Any) -> None:
        """The condition no longer looks at what the body counts."""
        comparison = next(each for each in _nested(op(program, "while_loop")) if each.type == "less")
        comparison.inputs["y"].CopyFrom(comparison.inputs["x"])
        comparison.type = "equal"

    monkeypatch.setattr(interpreter, "_LONGEST_LOOP", 1000)
    with pytest.raises(InputError, match=r"while_loop .*: it did not end within 1000 rounds"):
        run(edit(forever))


def _nested(each: Any) -> list[Any]:
    return [inner for block in each.blocks for inner in block.operations]


def _messages(message: Any) -> list[Any]:
    """A protobuf message and all inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = [value[key] for key in sorted(value) if hasattr(value[key], "ListFields")]
        else:
            inner = list(value) if field.is_repeated else [value]
        for each in inner:
            found += _messages(each)
    return found


def _mutate(rng: random.Random, program: Any) -> None:
    """Change one field somewhere: remove it, repeat it, or put something of its type in its place."""
    everywhere = _messages(program)
    names = [value.name for each in everywhere if each.DESCRIPTOR.name == "Operation" for value in each.outputs]
    kinds = [each.type for each in everywhere if each.DESCRIPTOR.name == "Operation"]
    numbers = [0, 1, 2, 3, 5, 64, 2**31, 2**32 + 1, 2**63 - 1, 2**64 - 1, -1]
    message = rng.choice([each for each in everywhere if each.ListFields()])
    field, value = rng.choice(message.ListFields())
    with contextlib.suppress(ValueError, TypeError):  # a number that the field does not hold
        if field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            del value[rng.choice(sorted(value))]
        elif field.is_repeated:
            place = rng.randrange(len(value))
            again = value[place]
            if rng.random() < 0.5:
                del value[place]
            elif field.type == field.TYPE_STRING:
                value[place] = rng.choice([*names, "", "x", "s"])
            elif field.type == field.TYPE_MESSAGE:
                value.append(type(again).FromString(again.SerializeToString()))
            else:
                value[place] = type(again)(rng.choice(numbers))
        elif field.type == field.TYPE_MESSAGE:
            same = rng.choice([each for each in everywhere if each.DESCRIPTOR is field.message_type])
            getattr(message, field.name).CopyFrom(type(same).FromString(same.SerializeToString()))
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, rng.choice([*names, *kinds, "", "lstm", "fill", "tile", "one_hot", "pad"]))
        elif field.type == field.TYPE_BYTES:
            setattr(message, field.name, value[: rng.randrange(len(value) + 1)])
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, not value)
        else:
            setattr(message, field.name, type(value)(rng.choice(numbers)))


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 5000), marks=pytest.mark.slow)], ids=len)
def test_nothing_escapes_as_another_error(edit, monkeypatch, seeds):
    monkeypatch.setattr(interpreter, "_LONGEST_LOOP", 1000)
    results = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = edit(lambda program, rng=rng: [_mutate(rng, program) for _ in range(rng.choice([1, 1, 2, 3]))])
        try:
            run(path)
            results += 1
        except EdgekitError:
            pass
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
    assert 0 < results < len(seeds) / 2


def test_a_state_that_no_device_holds(edit):
    def change(program):
        function = program.functions["main"]
        state = next(value for value in function.inputs if value.name == "s").type.stateType.wrappedType.tensorType
        state.dimensions[0].constant.size = 2**40
        for op in function.block_specializations[function.opset].operations:
            if op.type == "read_state":
                op.outputs[0].type.tensorType.dimensions[0].constant.size = 2**40

    with pytest.raises(InputError, match=r"the state s is .*none above 2\^28 elements"):
        run(edit(change))
