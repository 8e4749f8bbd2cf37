#!/usr/bin/env python3
"""Check this bundle on a Mac: does Core ML compute what PyTorch computed, how fast, and on which device?

    python3 check_on_mac.py              check, measure, and write the section "mac" of report.json
    python3 check_on_mac.py --dry-run    say what would be done; works on any system

It needs Python 3.9, numpy and coremltools (pip install coremltools), for models that take images Pillow as well. Copy
the bundle's folder back afterwards: `edgekit inspect` shows what was measured.

This file is a part of the bundle and knows it from manifest.json alone; edgekit need not be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EDGEKIT = ""  # the version that wrote this file
TOLERANCE = 0.0  # the largest relative L2 error of an output that passes

SCHEMA = 1
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
# The macOS that came with each iOS, and what the compute plan needs.
MACOS = {"iOS16": (13, 0), "iOS17": (14, 0), "iOS18": (15, 0)}
PLAN_MACOS = (14, 4)
PACKAGE = "model.mlpackage"
_DEVICES = {"MLCPUComputeDevice": "CPU", "MLGPUComputeDevice": "GPU", "MLNeuralEngineComputeDevice": "NE"}


class Stop(Exception):  # noqa: N818  # not an error of the program
    """Why nothing can be checked here, for people."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where every compute unit passed, 1 where one did not, 2 where nothing could be checked."""
    options = _options(arguments)
    folder = Path(__file__).resolve().parent
    try:
        bundle = Bundle(folder)
        if options.dry_run:
            return dry_run(bundle, options)
        return check(bundle, options)
    except Stop as stop:
        print(f"cannot check: {stop}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; report.json is as it was", file=sys.stderr)
        return 130


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), help="compute units to check")
    parser.add_argument("--runs", type=_count, default=50, help="timed runs per compute unit (50)")
    parser.add_argument("--warmup", type=_count, default=5, help="runs before them (5)")
    parser.add_argument("--no-plan", action="store_true", help="leave out the device and the cost of each op")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


class Bundle:
    """The folder of this file: its manifest, and the graphs to run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
            self.info: dict[str, Any] = self.manifest["coreml"]
            self.files: dict[str, dict[str, Any]] = self.manifest["files"]
            self.name = f"{self.manifest['name']} ({self.manifest['precision']})"
            self.target = str(self.info["deployment_target"])
            self.least = MACOS[self.target]
            self.graphs = [self._graph("main", self.manifest, self.info["function"], "samples.npz")]
            if self.manifest.get("decode"):
                decode = self.manifest["decode"]
                self.graphs[0]["name"] = "prefill"
                self.graphs.append(self._graph("decode", decode, decode["function"], decode["samples"]))
        except OSError as error:
            raise Stop(
                f"there is no readable manifest.json beside this file ({error}); copy the whole bundle"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Stop(f"manifest.json is damaged or of another edgekit ({error!r}); copy the bundle again") from error

    def _graph(self, name: str, data: dict[str, Any], function: str, samples: str | None) -> dict[str, Any]:
        return {
            "name": name,
            "function": function,
            "inputs": list(data["inputs"]),
            "outputs": [spec["name"] for spec in data["outputs"]],
            "samples": samples if samples in self.files else None,
        }

    def package_sha256(self) -> str:
        """Which package this is: the names and hashes of its files, hashed."""
        lines = [
            f"{name} {entry['sha256']}\n" for name, entry in sorted(self.files.items()) if name.startswith(PACKAGE)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def verify_files(self) -> None:
        """Compare every file with its SHA-256 in the manifest."""
        for name, entry in self.files.items():
            digest = hashlib.sha256()
            try:
                with (self.folder / name).open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise Stop(f"{name} cannot be read ({error.strerror}); copy the whole bundle") from error
            if digest.hexdigest() != entry["sha256"]:
                raise Stop(f"{name} was changed after the export, or copied badly; copy the bundle again")

    def read_report(self) -> dict[str, Any]:
        """What report.json holds so far: kept, but for the section `mac`."""
        path = self.folder / "report.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise Stop(f"report.json cannot be read ({error}); move it away") from error
        if not isinstance(report, dict):
            raise Stop("report.json holds no JSON object; move it away")
        return report

    def write_report(self, section: dict[str, Any]) -> None:
        """Add the section `mac` in one step: whoever reads, or a crash, sees the old file or the new one."""
        report = self.read_report()
        report["mac"] = section
        temporary = self.folder / f".report.json.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(self.folder / "report.json")
        except OSError as error:
            raise Stop(
                f"report.json cannot be written ({error.strerror}); copy the bundle to a folder of yours"
            ) from error
        finally:
            if temporary.exists():
                temporary.unlink()


def obstacles(bundle: Bundle) -> list[str]:
    """Why this machine cannot check the bundle; empty where it can."""
    found = []
    if sys.platform != "darwin":
        found.append(f"Core ML runs on macOS alone, and this is {platform.system()}; copy the bundle to a Mac")
    elif macos_version() < bundle.least:
        needs, has = (".".join(map(str, version)) for version in (bundle.least, macos_version()))
        found.append(
            f"the model is for {bundle.target}, which needs macOS {needs}; this is {has}. Update macOS, or export with "
            "an older --deployment-target"
        )
    modules = {"numpy": "numpy", "coremltools": "coremltools"}
    if bundle.info["image_input"]:
        modules["PIL"] = "pillow"
    for module, package in modules.items():
        if importlib.util.find_spec(module) is None:
            found.append(f"{module} is not installed; run: {sys.executable} -m pip install {package}")
    return found


def macos_version() -> tuple[int, ...]:
    """Such as (14, 4); (0,) where the system does not say."""
    numbers = [int(number) for number in re.findall(r"\d+", platform.mac_ver()[0])[:2]]
    return tuple(numbers) or (0,)


def dry_run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Say what a run would do."""
    least = ".".join(map(str, bundle.least))
    print(f"{bundle.name}: for {bundle.target}, so macOS {least} or later. Without --dry-run this would")
    print(f"1. compare {len(bundle.files)} files with the hashes in manifest.json")
    for graph in bundle.graphs:
        print(f"2. load {PACKAGE}, function {graph['function']}, for each of {', '.join(options.units)}, and")
        print(f"   - run the samples in {graph['samples']} and compare {_outputs(graph)} with PyTorch's: relative L2")
        print(f"     error at most {TOLERANCE:g}")
        print(f"   - run the first sample {options.warmup} times to warm up and {options.runs} times for the latency")
    if not options.no_plan:
        print("3. ask MLComputePlan for the device and the estimated cost of each op (macOS 14.4 or later)")
    print('4. write what was found as the section "mac" of report.json, at the end and in one step')
    for obstacle in obstacles(bundle):
        print(f"here it would stop: {obstacle}")
    return 0


def _outputs(graph: dict[str, Any]) -> str:
    names = graph["outputs"]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(bundle: Bundle, options: argparse.Namespace) -> int:
    """Run everything, print it, and write it down."""
    for obstacle in obstacles(bundle):
        raise Stop(obstacle)
    bundle.verify_files()
    bundle.read_report()  # a broken one is told before an hour of measuring
    machine = describe_machine()
    print(f"{bundle.name} on {machine['chip']}, macOS {machine['macos']}, coremltools {machine['coremltools']}")
    if machine["translated"]:
        print("note: this Python runs under Rosetta, where Core ML does not reach the Neural Engine; use an arm64 one")
    graphs = []
    for graph in bundle.graphs:
        samples = read_samples(bundle, graph)
        units = []
        for name in options.units:
            result = measure_unit(bundle, graph, samples, name, options)
            units.append(result)
            print(_row(graph, result))
        plan = None if options.no_plan else compute_plan(bundle, graph)
        if plan is not None:
            print(f"  {_plan_line(plan)}")
        graphs.append({"name": graph["name"], "function": graph["function"], "units": units, "plan": plan})
    passed = all(unit["passed"] for graph in graphs for unit in graph["units"])
    section = {
        "schema": SCHEMA,
        "edgekit": EDGEKIT,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "package_sha256": bundle.package_sha256(),
        "machine": machine,
        "tolerance": TOLERANCE,
        "graphs": graphs,
        "passed": passed,
    }
    bundle.write_report(section)
    print(f'{"PASSED" if passed else "FAILED"}; written to report.json as the section "mac"')
    return 0 if passed else 1


def describe_machine() -> dict[str, Any]:
    """Chip, model, system and versions, as far as they can be told."""
    import numpy

    ct = importlib.import_module("coremltools")
    memory = _sysctl("hw.memsize")
    return {
        "chip": _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown",
        "model": _sysctl("hw.model") or "unknown",
        "memory_bytes": int(memory) if memory.isdigit() else None,
        "macos": platform.mac_ver()[0] or "unknown",
        "arch": platform.machine(),
        "translated": _sysctl("sysctl.proc_translated") == "1",
        "python": platform.python_version(),
        "coremltools": str(getattr(ct, "__version__", "unknown")),
        "numpy": numpy.__version__,
    }


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def read_samples(bundle: Bundle, graph: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs and PyTorch's outputs by name, sample by sample."""
    import numpy

    if graph["samples"] is None:
        raise Stop("the bundle holds no samples to compare with; export it again")
    pairs: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    with numpy.load(bundle.folder / graph["samples"], allow_pickle=False) as arrays:
        for key in arrays.files:
            match = re.fullmatch(r"(inputs|outputs)(?:\.(\d+))?/(.+)", key, re.DOTALL)
            if match is None:
                raise Stop(f"{graph['samples']} holds the unexpected array {key!r}; export the bundle again")
            stored = arrays[key]
            each = enumerate(stored) if match[2] is None else [(int(match[2]), stored)]
            for index, array in each:
                pairs.setdefault(index, ({}, {}))[0 if match[1] == "inputs" else 1][match[3]] = array
    return [pairs[index] for index in sorted(pairs)]


class Model:
    """One function of the package on one compute unit."""

    def __init__(self, bundle: Bundle, graph: dict[str, Any], units: str) -> None:
        ct = importlib.import_module("coremltools")
        several = len(bundle.info["functions"]) > 1
        chosen = {"function_name": graph["function"]} if several else {}
        self.specs = {spec["name"]: spec for spec in graph["inputs"]}
        self.states = list(bundle.info["states"])
        self.image = bundle.info["image_input"]
        start = time.perf_counter()
        self.model = ct.models.MLModel(
            str(bundle.folder / PACKAGE), compute_units=getattr(ct.ComputeUnit, units), **chosen
        )
        self.load_ms = 1e3 * (time.perf_counter() - start)

    def inputs(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays as coremltools takes them, the states left out."""
        kept = {state["input"] for state in self.states}
        return {name: self._input(name, array) for name, array in arrays.items() if name not in kept}

    def _input(self, name: str, array: Any) -> Any:
        import numpy

        if name != self.image:
            return numpy.asarray(array, numpy.float32 if array.dtype.kind == "f" else numpy.int32)
        image = importlib.import_module("PIL.Image")
        levels = array[0].transpose(1, 2, 0)
        if self.specs[name]["preprocessing"]["color"] == "bgr":
            levels = levels[..., ::-1]  # an image says which level is red: the model sorts them
        levels = numpy.ascontiguousarray(levels[..., 0] if levels.shape[2] == 1 else levels)
        return image.fromarray(levels)

    def make_state(self, arrays: dict[str, Any]) -> Any:
        """A state that holds the arrays of the inputs that stand for it; None for a model without."""
        import numpy

        if not self.states:
            return None
        state = self.model.make_state()
        for entry in self.states:
            state.write_state(entry["name"], numpy.asarray(arrays[entry["input"]], numpy.float32))
        return state

    def run(self, inputs: dict[str, Any], state: Any) -> dict[str, Any]:
        """The model's answer by output, what it left in the state included."""
        given = dict(inputs)  # coremltools changes what it gets
        answer = dict(self.model.predict(given) if state is None else self.model.predict(given, state))
        for entry in self.states:
            answer[entry["output"]] = state.read_state(entry["name"])
        return answer


def measure_unit(
    bundle: Bundle, graph: dict[str, Any], samples: list[Any], units: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Answers and latency on one compute unit. A fault of Core ML's is recorded; other units get their turn."""
    result: dict[str, Any] = {"units": units, "passed": False, "problem": None, "load_ms": None, "first_run_ms": None}
    result.update({"runs": 0, "latency_ms": None, "outputs": []})
    try:
        model = Model(bundle, graph, units)
        result["load_ms"] = model.load_ms
        worst: dict[str, dict[str, Any]] = {}
        for inputs, expected in samples:
            prepared, state = model.inputs(inputs), model.make_state(inputs)
            start = time.perf_counter()
            answer = model.run(prepared, state)
            if result["first_run_ms"] is None:
                result["first_run_ms"] = 1e3 * (time.perf_counter() - start)
            for name, wanted in expected.items():
                found = compare(name, wanted, answer.get(name))
                if name not in worst or _badness(found) > _badness(worst[name]):
                    worst[name] = found
        result["outputs"] = list(worst.values())
        result["passed"] = bool(worst) and all(output["passed"] for output in worst.values())
        result["latency_ms"] = latency(model, samples[0][0], options)
        result["runs"] = options.runs
    except Stop:
        raise
    except Exception as error:
        result["passed"] = False
        result["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return result


def _badness(output: dict[str, Any]) -> float:
    return float("inf") if output["rel_l2"] is None else float(output["rel_l2"])


def compare(name: str, wanted: Any, got: Any) -> dict[str, Any]:
    """The relative L2 error of one output, norm(got - wanted) / norm(wanted), and the largest absolute difference."""
    import numpy

    result: dict[str, Any] = {"name": name, "rel_l2": None, "max_abs": None, "passed": False, "problem": None}
    if got is None:
        return {**result, "problem": "Core ML gave no output of this name"}
    wanted, got = numpy.asarray(wanted, numpy.float64), numpy.asarray(got, numpy.float64)
    if wanted.shape != got.shape:
        return {**result, "problem": f"the shape is {list(got.shape)}, PyTorch gave {list(wanted.shape)}"}
    if not numpy.isfinite(got).all():
        return {**result, "problem": f"{int((~numpy.isfinite(got)).sum())} of {got.size} values are NaN or infinite"}
    error, norm = float(numpy.linalg.norm(got - wanted)), float(numpy.linalg.norm(wanted))
    relative = error / norm if norm > 0 else (0.0 if error == 0 else None)
    if relative is None or not numpy.isfinite(relative):
        return {**result, "problem": "PyTorch gave zeros or no finite values, and Core ML did not"}
    largest = float(numpy.abs(got - wanted).max()) if got.size else 0.0
    return {**result, "rel_l2": relative, "max_abs": largest, "passed": relative <= TOLERANCE}


def latency(model: Model, arrays: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a prediction, coremltools' conversion of inputs included; a state goes on from run to run."""
    import numpy

    inputs, state = model.inputs(arrays), model.make_state(arrays)
    times = []
    for index in range(options.warmup + options.runs):
        given = dict(inputs)
        start = time.perf_counter()
        if state is None:
            model.model.predict(given)
        else:
            model.model.predict(given, state)
        if index >= options.warmup:
            times.append(1e3 * (time.perf_counter() - start))
    p50, p90, p99 = (float(value) for value in numpy.percentile(times, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(numpy.mean(times)), "min": min(times), "max": max(times)}


def compute_plan(bundle: Bundle, graph: dict[str, Any]) -> dict[str, Any]:
    """Where Core ML would run each op with all units allowed, and its share of the cost, as it estimates them."""
    plan: dict[str, Any] = {"problem": None, "devices": {}, "ops": []}
    if macos_version() < PLAN_MACOS:
        return {**plan, "problem": f"MLComputePlan needs macOS {PLAN_MACOS[0]}.{PLAN_MACOS[1]}"}
    try:
        ct = importlib.import_module("coremltools")
        module = importlib.import_module("coremltools.models.compute_plan")
        compiled = Model(bundle, graph, "ALL").model.get_compiled_model_path()
        found = module.MLComputePlan.load_from_path(path=compiled, compute_units=ct.ComputeUnit.ALL)
        operations = found.model_structure.program.functions[graph["function"]].block.operations
        plan["ops"] = [_planned(found, op) for op in _flat(operations) if _kind(op) != "const"]
    except Exception as error:
        return {**plan, "problem": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    for op in plan["ops"]:
        device = plan["devices"].setdefault(op["device"] or "unknown", {"ops": 0, "cost": 0.0})
        device["ops"] += 1
        device["cost"] += op["cost"] or 0.0
    return plan


def _flat(operations: Any) -> list[Any]:
    """Operations and those of their inner blocks."""
    return [each for op in operations for each in (op, *_flat([o for block in op.blocks for o in block.operations]))]


def _kind(operation: Any) -> str:
    """`ios17.conv` and `conv` are the same op."""
    return str(operation.operator_name).rsplit(".", 1)[-1]


def _planned(plan: Any, operation: Any) -> dict[str, Any]:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    outputs = list(operation.outputs)
    return {
        "op": _kind(operation),
        "name": str(outputs[0].name) if outputs else "",
        "device": None if usage is None else _device(usage.preferred_compute_device),
        "supported": [] if usage is None else [_device(device) for device in usage.supported_compute_devices],
        "cost": None if cost is None else float(cost.weight),
    }


def _device(device: Any) -> str:
    return _DEVICES.get(type(device).__name__, "unknown")


def _row(graph: dict[str, Any], result: dict[str, Any]) -> str:
    start = f"  {graph['name']:8}{result['units']:12}"
    if result["problem"]:
        return f"{start}failed: {result['problem']}"
    problems = [f"{output['name']}: {output['problem']}" for output in result["outputs"] if output["problem"]]
    errors = [output["rel_l2"] for output in result["outputs"] if output["rel_l2"] is not None]
    figures = result["latency_ms"]
    verdict = "ok" if result["passed"] else problems[0] if problems else "differs"
    return (
        f"{start}p50 {figures['p50']:.3g} ms  p90 {figures['p90']:.3g} ms  p99 {figures['p99']:.3g} ms  "
        f"load {result['load_ms']:.3g} ms  rel L2 {max(errors, default=float('nan')):.2e}  {verdict}"
    )


def _plan_line(plan: dict[str, Any]) -> str:
    if plan["problem"]:
        return f"no compute plan: {plan['problem']}"
    devices = sorted(plan["devices"].items(), key=lambda item: -item[1]["ops"])
    return "compute plan: " + ", ".join(f"{name} {each['ops']} ops" for name, each in devices)


if __name__ == "__main__":
    raise SystemExit(main())
