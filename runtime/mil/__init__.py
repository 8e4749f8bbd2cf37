"""Core ML's ML programs without Core ML: read a saved `.mlpackage`, look at its program, run it in numpy.

program = load_program(Path("model.mlpackage"))
program.functions["main"].operations[0].op_type               # read it
MilInterpreter(program).run({"image": array})                 # {"logits": array}
"""

from edgekit.runtime.mil.interpreter import NUMERICS, MilInterpreter, OpCall
from edgekit.runtime.mil.loading import load_program
from edgekit.runtime.mil.program import (
    Argument,
    Constant,
    MilBlock,
    MilFunction,
    MilOp,
    MilProgram,
    MilValue,
    Reference,
    ValueType,
)

__all__ = [
    "NUMERICS",
    "Argument",
    "Constant",
    "MilBlock",
    "MilFunction",
    "MilInterpreter",
    "MilOp",
    "MilProgram",
    "MilValue",
    "OpCall",
    "Reference",
    "ValueType",
    "load_program",
]
