"""Stands in for Core ML Tools on a Mac: the calls that `check_on_mac.py` makes, and models that are sums.

FAKE_COREML says what goes wrong: `differs:UNITS`, `fails:UNITS`, `nan:UNITS`, `interrupt:UNITS`, `stateless`,
`no-output`, `no-plan`.
"""

import enum

__version__ = "9.0"


class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


from coremltools import models as models  # noqa: E402
