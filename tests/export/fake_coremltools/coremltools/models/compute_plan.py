"""A plan with a convolution on the Neural Engine, a loop with an op on the CPU, and one that nobody knows."""

import os
from types import SimpleNamespace

import coremltools


class MLCPUComputeDevice:
    pass


class MLNeuralEngineComputeDevice:
    pass


CPU, NE = MLCPUComputeDevice(), MLNeuralEngineComputeDevice()


def op(kind, name, *blocks):
    inner = [SimpleNamespace(operations=list(operations)) for operations in blocks]
    return SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)], blocks=inner)


class MLComputePlan:
    @classmethod
    def load_from_path(cls, path, compute_units):
        assert compute_units is coremltools.ComputeUnit.ALL
        if os.environ.get("FAKE_COREML") == "no-plan":
            raise ValueError("MLComputePlan is not supported.")
        plan = cls()
        operations = [
            op("const", "w"),
            op("ios17.conv", "y"),
            op("while_loop", "loop", [op("topk", "best"), op("const", "k")]),
        ]
        function = SimpleNamespace(block=SimpleNamespace(operations=operations))
        program = SimpleNamespace(functions={path.removesuffix(".mlmodelc"): function})
        plan.model_structure = SimpleNamespace(program=program)
        return plan

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        if operation.operator_name == "while_loop":
            return None
        preferred, others = (NE, [CPU, NE]) if operation.operator_name == "ios17.conv" else (CPU, [CPU])
        return SimpleNamespace(preferred_compute_device=preferred, supported_compute_devices=others)

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        if operation.operator_name == "while_loop":
            return None
        return SimpleNamespace(weight=0.75 if operation.operator_name == "ios17.conv" else 0.25)
