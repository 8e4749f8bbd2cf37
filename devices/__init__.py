"""Where does a bundle run, how fast, and what is missing there?"""

from edgekit.devices.database import Device, get_device, list_devices
from edgekit.devices.doctor import Check, Diagnosis, diagnose
from edgekit.devices.profiling import profile
from edgekit.devices.report import diagnosis_lines

__all__ = [
    "Check",
    "Device",
    "Diagnosis",
    "diagnose",
    "diagnosis_lines",
    "get_device",
    "list_devices",
    "profile",
]
