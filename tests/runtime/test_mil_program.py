"""Programs as a whole: reading them, control flow, state, several functions, precision, and packages that lie."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BundleError, EdgekitError, InputError, UnknownNameError
from edgekit.runtime.mil import MilInterpreter, Reference, load_program
from edgekit.runtime.mil.loading import import_proto

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def dense(mb: Any, x: Any) -> Any:
    hidden = mb.linear(x=x, weight=WEIGHT, bias=np.arange(4, dtype=np.float32), name="hidden")
    return mb.relu(x=hidden, name="out")


@pytest.fixture(scope="module")
def dense_package(write_package) -> Path:
    return write_package({"main": ({"x": ("fp32", (2, 3))}, dense)}, "iOS16")


def run(package: Path, inputs: dict[str, Any], *, function: str = "main", numerics: str = "typed", **more: Any) -> Any:
    return MilInterpreter(load_program(package), function, numerics=numerics).run(inputs, **more)


class TestReading:
    def test_what_a_program_says(self, dense_package):
        program = load_program(dense_package)
        function = program.function()
        assert (program.specification_version, list(program.functions), function.opset) == (7, ["main"], "CoreML6")
        assert [str(value.type) for value in function.inputs] == ["float32[2, 3]"]
        assert [(value.name, str(value.type)) for value in function.outputs] == [("out", "float32[2, 4]")]
        linear = function.producers["hidden"]
        assert (linear.op_type, linear.inputs["x"]) == ("linear", (Reference("x"),))
        np.testing.assert_array_equal(function.constant(linear, "weight"), WEIGHT)
        assert function.constant(linear, "x") is None
        assert function.constants["hidden_weight_0"].file == "@model_path/weights/weight.bin"
        assert [op.op_type for op in function.walk() if op.op_type != "const"] == ["linear", "relu"]

    def test_no_such_function(self, dense_package):
        with pytest.raises(InputError, match=r"model.mlpackage has no function 'prefill'; it has main"):
            MilInterpreter(load_program(dense_package), "prefill")

    def test_no_such_numerics(self, dense_package):
        with pytest.raises(UnknownNameError, match="fp16sum"):
            MilInterpreter(load_program(dense_package), numerics="fp16")


class TestRunning:
    def test_result_and_trace(self, dense_package):
        calls = []
        result = run(dense_package, {"x": X}, trace=calls.append)
        np.testing.assert_allclose(result["out"], np.maximum(X @ WEIGHT.T + np.arange(4), 0), rtol=1e-6, atol=1e-6)
        assert [(call.op_type, call.name, call.outputs[0].shape) for call in calls] == [
            ("linear", "hidden", (2, 4)),
            ("relu", "out", (2, 4)),
        ]
        assert calls[0].inputs["weight"].shape == (4, 3)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            pytest.param({}, r"takes the inputs x: float32\[2, 3\]; got none", id="missing"),
            pytest.param({"y": X}, "takes the inputs x", id="misnamed"),
            pytest.param({"x": X.T}, r"expected float32\[2, 3\], got an array of shape \[3, 2\]", id="shape"),
            pytest.param({"x": np.full((2, 3), "a")}, "got an array of <U1", id="text"),
        ],
    )
    def test_inputs_that_do_not_fit(self, dense_package, inputs, message):
        with pytest.raises(InputError, match=message):
            run(dense_package, inputs)

    def test_integers(self, write_package):
        package = write_package({"main": ({"i": ("int32", (3,))}, lambda mb, i: mb.add(x=i, y=np.int32(1)))}, "iOS16")
        result = run(package, {"i": np.array([1, 2, 3], np.int64)})
        assert [value.tolist() for value in result.values()] == [[2, 3, 4]]
        with pytest.raises(InputError, match=r"expected int32.*int64 that it does not hold"):
            run(package, {"i": np.array([1, 2, 2**40], np.int64)})

    def test_sizes_known_at_run_time(self, write_package):
        def build(mb: Any, x: Any) -> Any:
            rows = mb.slice_by_index(x=mb.shape(x=x), begin=[0], end=[1])
            return mb.reshape(x=x, shape=mb.concat(values=[rows, np.array([-1], np.int32)], axis=0))

        package = write_package({"main": ({"x": ("fp32", (None, 2, 3))}, build)}, "iOS16")
        for rows in (1, 5):
            x = np.random.default_rng(rows).standard_normal((rows, 2, 3)).astype(np.float32)
            np.testing.assert_array_equal(next(iter(run(package, {"x": x}).values())), x.reshape(rows, 6))
        with pytest.raises(InputError, match=r"expected float32\[\?, 2, 3\]"):
            run(package, {"x": np.zeros((4, 3, 2), np.float32)})

    def test_what_is_handed_in_and_out_is_the_callers(self, write_package):
        package = write_package({"main": ({"x": ("fp32", (3,))}, lambda mb, x: mb.identity(x=x))}, "iOS16")
        interpreter, x = MilInterpreter(load_program(package)), np.ones(3, np.float32)
        (result,) = interpreter.run({"x": x}).values()
        result += 1
        assert x.tolist() == [1, 1, 1]

    def test_classes(self, write_package):
        def build(mb: Any, x: Any) -> Any:
            from coremltools.converters.mil.mil import mil_list

            return mb.classify(probabilities=x, classes=mb.const(val=mil_list(["cat", "dog", "owl"])))

        package = write_package({"main": ({"x": ("fp32", (1, 3))}, build)}, "iOS16")
        label, table = run(package, {"x": np.array([[0.25, 0.5, 0.25]], np.float32)}).values()
        assert (label, table) == ("dog", {"cat": 0.25, "dog": 0.5, "owl": 0.25})


@pytest.fixture(scope="module")
def half_package(write_package) -> Path:
    """x * 300 / 300 and a sum, in fp16."""

    def build(mb: Any, x: Any) -> Any:
        large = mb.mul(x=x, y=np.float16(300), name="large")
        return mb.real_div(x=large, y=np.float16(300), name="back"), mb.reduce_sum(x=x, axes=[0], name="sum")

    return write_package({"main": ({"x": ("fp16", (5000,))}, build)}, "iOS16")


class TestPrecision:
    """Infinity beyond 65504, sums that stall, and the modes."""

    def test_typed(self, half_package):
        result = run(half_package, {"x": np.full(5000, 300, np.float32)})
        assert result["back"].dtype == np.float16
        assert np.isinf(result["back"]).all()
        assert run(half_package, {"x": np.ones(5000, np.float32)})["sum"] == np.float16(5000)

    def test_fp32_ignores_fp16(self, half_package):
        result = run(half_package, {"x": np.full(5000, 300.1, np.float32)}, numerics="fp32")
        assert result["back"].dtype == np.float32
        np.testing.assert_allclose(result["back"], 300.1, rtol=1e-6)

    def test_fp16sum(self, half_package):
        assert run(half_package, {"x": np.ones(5000, np.float32)}, numerics="fp16sum")["sum"] == 2048

    def test_subnormals_are_kept(self, write_package):
        build = lambda mb, x: mb.mul(x=x, y=np.float16(0.5))  # noqa: E731
        package = write_package({"main": ({"x": ("fp16", (3,))}, build)}, "iOS16")
        (result,) = run(package, {"x": np.array([2.0**-14, 2.0**-24, 3 * 2.0**-24], np.float16)}).values()
        assert result.tolist() == [2.0**-15, 0, 2 * 2.0**-24]  # ties to even

    def test_fp32_ops_of_a_mixed_program_are_not_rounded(self, write_package):
        def build(mb: Any, x: Any) -> Any:
            wide = mb.cast(x=x, dtype="fp32")
            return mb.mul(x=wide, y=np.float32(1 / 3), name="wide"), mb.cast(x=wide, dtype="fp16", name="narrow")

        package = write_package({"main": ({"x": ("fp16", (2,))}, build)}, "iOS16")
        result = run(package, {"x": np.array([1, 5], np.float16)})
        assert result["wide"].tolist() == (np.array([1, 5], np.float32) * np.float32(1 / 3)).tolist()
        assert result["narrow"].dtype == np.float16


class TestControlFlow:
    def test_while_loop(self, write_package):
        """Doubles until the sum exceeds a limit; the condition reads a value from outside of the loop."""

        def build(mb: Any, x: Any, limit: Any) -> Any:
            count = mb.const(val=np.array([0], np.int32))

            def go_on(x: Any, count: Any) -> Any:
                return mb.less(x=mb.reduce_sum(x=x, axes=[0]), y=mb.squeeze(x=limit))

            def body(x: Any, count: Any) -> Any:
                return mb.mul(x=x, y=np.float32(2)), mb.add(x=count, y=np.array([1], np.int32))

            return mb.while_loop(_cond=go_on, _body=body, loop_vars=(x, count))

        package = write_package({"main": ({"x": ("fp32", (3,)), "limit": ("fp32", (1,))}, build)}, "iOS16")
        x = np.array([1, 2, 3], np.float32)
        doubled, count = run(package, {"x": x, "limit": np.float32([50])}).values()
        assert (doubled.tolist(), count.tolist()) == ([16, 32, 48], [4])
        unchanged, count = run(package, {"x": x, "limit": np.float32([1])}).values()
        assert (unchanged.tolist(), count.tolist()) == ([1, 2, 3], [0])

    def test_nested(self, write_package):
        def build(mb: Any, x: Any, number: Any) -> Any:
            flag = mb.greater(x=mb.squeeze(x=number), y=np.int32(0))
            shifted = mb.add(x=x, y=np.float32(1))

            def yes() -> Any:
                inner = mb.cond(pred=mb.logical_not(x=flag), _true_fn=lambda: mb.mul(x=x, y=np.float32(-1)),
                                _false_fn=lambda: mb.mul(x=shifted, y=np.float32(10)))  # fmt: skip
                return mb.add(x=inner, y=np.float32(0.5))

            return mb.cond(pred=flag, _true_fn=yes, _false_fn=lambda: mb.identity(x=shifted))

        package = write_package({"main": ({"x": ("fp32", (2,)), "number": ("int32", (1,))}, build)}, "iOS16")
        x = np.array([1, 2], np.float32)
        (yes,), (no,) = (run(package, {"x": x, "number": np.int32([n])}).values() for n in (1, 0))
        assert (yes.tolist(), no.tolist()) == ([20.5, 30.5], [2, 3])


@pytest.fixture(scope="module")
def stateful_package(write_package) -> Path:
    def build(mb: Any, x: Any, total: Any) -> Any:
        before = mb.read_state(input=total)
        after = mb.coreml_update_state(state=total, value=mb.add(x=before, y=x))
        return mb.sub(x=after, y=before, name="difference"), mb.identity(x=before, name="before")

    specs = {"x": ("fp16", (2, 2)), "total": ("fp16", (2, 2), "state")}
    return write_package({"main": (specs, build)}, "iOS18")


class TestState:
    def test_a_state_lives_in_the_dict(self, stateful_package):
        interpreter, states = MilInterpreter(load_program(stateful_package)), {}
        assert [(state.name, str(state.type)) for state in interpreter.states] == [("total", "float16[2, 2]")]
        x = np.array([[1, 2], [3, 4]], np.float16)
        for runs in range(1, 4):
            result = interpreter.run({"x": x}, states)
            np.testing.assert_array_equal(states["total"], runs * x)
            np.testing.assert_array_equal(result["before"], (runs - 1) * x)
            np.testing.assert_array_equal(result["difference"], x)
        assert states["total"].dtype == np.float16

    def test_what_was_handed_in_is_not_written_to(self, stateful_package):
        given = np.ones((2, 2), np.float16)
        states = {"total": given}
        run(stateful_package, {"x": given}, states=states)
        assert given.tolist() == [[1, 1], [1, 1]]
        assert states["total"].tolist() == [[2, 2], [2, 2]]

    def test_a_state_that_is_not_there(self, stateful_package):
        with pytest.raises(InputError, match="no state 'sum'; it has total"):
            run(stateful_package, {"x": np.ones((2, 2))}, states={"sum": np.ones((2, 2), np.float16)})
        with pytest.raises(InputError, match=r"state total: expected float16\[2, 2\]"):
            run(stateful_package, {"x": np.ones((2, 2))}, states={"total": np.ones((2, 3), np.float16)})


def test_functions_share_a_package(write_package):
    functions = {
        name: ({"x": ("fp16", (size,))}, lambda mb, x, f=factor: mb.mul(x=x, y=np.float16(f), name="y"))
        for name, size, factor in (("decode", 1, 2), ("prefill_4", 4, 3))
    }
    program = load_program(write_package(functions, "iOS18"))
    assert (sorted(program.functions), program.default_function) == (["decode", "prefill_4"], "decode")
    for name, size, factor in (("decode", 1, 2), ("prefill_4", 4, 3)):
        result = MilInterpreter(program, name).run({"x": np.ones(size, np.float16)})
        assert result["y"].tolist() == [factor] * size


def test_functions_share_their_weights(write_package):
    """The same part of the weights file is decoded once for all functions, and kept only while one of them lives."""
    scale = np.full((8, 1), 0.5, np.float32)

    def build(mb: Any, x: Any) -> Any:
        packed = mb.constexpr_blockwise_shift_scale(data=np.full((8, 16), 3, np.int8), scale=scale)
        plain = mb.linear(x=x, weight=np.ones((16, 16), np.float32), bias=np.zeros(16, np.float32))
        return mb.linear(x=plain, weight=packed, bias=np.zeros(8, np.float32), name="y")

    package = write_package({"main": ({"x": ("fp32", (1, 16))}, build)}, "iOS18")
    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = import_proto().Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    spec.mlProgram.functions["twin"].CopyFrom(spec.mlProgram.functions["main"])
    path.write_bytes(spec.SerializeToString())

    def weights(interpreter: MilInterpreter) -> list[np.ndarray]:
        calls: list[Any] = []
        interpreter.run({"x": np.ones((1, 16), np.float32)}, trace=calls.append)
        return [call.inputs["weight"] for call in calls]

    program = load_program(package)
    main, twin = MilInterpreter(program, "main"), MilInterpreter(program, "twin", numerics="fp32")
    assert [weight.shape for weight in weights(main)] == [(16, 16), (8, 16)]
    assert weights(main)[1].tolist() == np.full((8, 16), 1.5).tolist()
    assert all(one is other for one, other in zip(weights(main), weights(twin), strict=True))
    assert weights(MilInterpreter(load_program(package)))[0] is not weights(main)[0]
    del main, twin
    assert len(program.decoded) == 0


class TestDamage:
    """The interpreter does not trust the file: each fault ends in an error of ours that says what is wrong."""

    @pytest.fixture
    def copy(self, dense_package, tmp_path) -> Path:
        return Path(shutil.copytree(dense_package, tmp_path / "copy.mlpackage"))

    def edit(self, package: Path, change: Any) -> None:
        path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
        spec = import_proto().Model_pb2.Model()
        spec.ParseFromString(path.read_bytes())
        change(spec.mlProgram.functions["main"])
        path.write_bytes(spec.SerializeToString())

    def fails(self, package: Path, message: str, kind: type[EdgekitError] = BundleError) -> None:
        with pytest.raises(kind, match=message):
            run(package, {"x": X})

    def block(self, function: Any) -> Any:
        return function.block_specializations[function.opset]

    def op(self, function: Any, op_type: str) -> Any:
        return next(op for op in self.block(function).operations if op.type == op_type)

    def weight(self, function: Any) -> Any:
        constants = [op for op in self.block(function).operations if op.type == "const"]
        return next(op for op in constants if op.attributes["val"].WhichOneof("value") == "blobFileValue")

    def test_no_package(self, tmp_path):
        self.fails(tmp_path, "is no Core ML package: it has no Manifest.json")

    def test_manifest(self, copy):
        (copy / "Manifest.json").write_text("{")
        self.fails(copy, "Manifest.json is damaged")

    def test_manifest_that_leads_outside(self, copy):
        data = json.loads((copy / "Manifest.json").read_text())
        data["itemInfoEntries"]["M"]["path"] = "../../secret"
        (copy / "Manifest.json").write_text(json.dumps(data))
        self.fails(copy, "leads outside of the package")

    @pytest.mark.parametrize("share", [0, 0.3, 0.9])
    def test_truncated_model(self, copy, share):
        path = copy / "Data" / "com.apple.CoreML" / "model.mlmodel"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        self.fails(copy, "damaged or truncated|holds no model")

    def test_missing_model(self, copy):
        (copy / "Data" / "com.apple.CoreML" / "model.mlmodel").unlink()
        self.fails(copy, "cannot read model.mlmodel")

    def test_missing_weights(self, copy):
        (copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").unlink()
        self.fails(copy, "weight.bin is missing; copy the whole package")

    @pytest.mark.parametrize("size", [0, 10, 100, 150])
    def test_truncated_weights(self, copy, size):
        path = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        path.write_bytes(path.read_bytes()[:size])
        self.fails(copy, r"weight.bin (cannot be read|is damaged)")

    @pytest.mark.parametrize("offset", [2**40, 2**63, 128, 65])
    def test_weights_elsewhere(self, copy, offset):
        def change(function: Any) -> None:
            self.weight(function).attributes["val"].blobFileValue.offset = offset

        self.edit(copy, change)
        self.fails(copy, "weight.bin is damaged at offset")

    def test_weights_of_another_size(self, copy):
        def change(function: Any) -> None:
            op = self.weight(function)
            for type_ in (op.attributes["val"].type, op.outputs[0].type):
                type_.tensorType.dimensions[0].constant.size = 5

        self.edit(copy, change)
        self.fails(copy, r"48 bytes, float32\[5, 3\] takes 60")

    def test_weights_outside_of_the_package(self, copy):
        def change(function: Any) -> None:
            self.weight(function).attributes["val"].blobFileValue.fileName = "@model_path/../../weight.bin"

        self.edit(copy, change)
        self.fails(copy, "leads outside of the package")

    def test_unknown_op(self, copy):
        self.edit(copy, lambda function: setattr(self.op(function, "relu"), "type", "swish7"))
        self.fails(copy, r"copy.mlpackage uses the op 'swish7' \(of 'out'\).*guesses no op's meaning", InputError)

    def test_wrong_shape(self, copy):
        def change(function: Any) -> None:
            self.op(function, "relu").outputs[0].type.tensorType.dimensions[1].constant.size = 7

        self.edit(copy, change)
        message = r"the op relu of 'out': it declares float32\[2, 7\], but gives float32\[2, 4\]"
        self.fails(copy, message, InputError)

    def test_wrong_dtype(self, copy):
        float16, int32 = (import_proto().MIL_pb2.DataType.Value(name) for name in ("FLOAT16", "INT32"))

        def declare(dtype: int) -> Any:
            return lambda function: setattr(self.op(function, "relu").outputs[0].type.tensorType, "dataType", dtype)

        self.edit(copy, declare(float16))
        self.fails(copy, r"relu of 'out' declares float16\[2, 4\], but its inputs are float32")
        self.edit(copy, declare(int32))
        self.fails(copy, r"relu of 'out': it declares int32\[2, 4\], but gives float32", InputError)

    def test_a_value_that_nothing_computes(self, copy):
        def change(function: Any) -> None:
            self.op(function, "relu").inputs["x"].arguments[0].name = "nowhere"

        self.edit(copy, change)
        self.fails(copy, "relu of 'out' takes 'nowhere', which no op before it computes")

    def test_an_output_that_nothing_computes(self, copy):
        self.edit(copy, lambda function: self.block(function).outputs.append("ghost"))
        self.fails(copy, "the output 'ghost' of main is computed nowhere")

    def test_a_missing_parameter(self, copy):
        self.edit(copy, lambda function: self.op(function, "linear").inputs.pop("weight"))
        self.fails(copy, "linear of 'hidden': its input weight is missing", InputError)

    @pytest.mark.parametrize("seed", range(40))
    def test_flipped_bytes_never_escape_as_other_errors(self, copy, seed):
        path = copy / "Data" / "com.apple.CoreML" / "model.mlmodel"
        data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(data))
        with contextlib.suppress(EdgekitError):
            run(copy, {"x": X})
