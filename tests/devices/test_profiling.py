from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from edgekit import devices
from edgekit.errors import UnknownNameError
from edgekit.runtime import profiler
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.profiler import Profile, ProfileComparison

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK: dict[str, Any] = {"runs": 8, "warmup": 1, "threads": 1, "ops": False}


def test_local_is_the_device_there_is() -> None:
    assert devices.list_devices() == ["local"]
    assert devices.get_device("local").kind == "local"


def test_unknown_device_names_the_near_one(tiny_bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError, match="unknown device 'locl'; did you mean local"):
        devices.profile(tiny_bundle, on="locl")


def test_profile_goes_into_the_report(tiny_bundle: Bundle) -> None:
    result = devices.profile(tiny_bundle, **QUICK)
    assert isinstance(result, Profile)
    assert Bundle.open(tiny_bundle.path).report() == {"profile": result.to_json()}


def test_packed_bundle_is_measured_and_left_as_it_is(tiny_bundle: Bundle) -> None:
    packed = tiny_bundle.pack()
    before = packed.path.read_bytes()
    assert isinstance(devices.profile(packed.path, **QUICK), Profile)
    assert packed.path.read_bytes() == before


def test_rival_gives_a_comparison_and_keeps_its_report(make_bundle: Callable[..., Bundle]) -> None:
    ours, rival = make_bundle("ours"), make_bundle("rival")
    result = devices.profile(ours, vs=rival, **QUICK)
    assert isinstance(result, ProfileComparison)
    assert ours.report() == {"profile": result.a.to_json(), "comparison": result.to_json()}
    assert rival.report() == {}


def test_arguments_and_defaults_are_those_of_the_profiler() -> None:
    ours = inspect.signature(devices.profile).parameters
    theirs = inspect.signature(profiler.profile_pair).parameters
    shared = {name: parameter.default for name, parameter in theirs.items() if not name.startswith("bundle")}
    assert {name: ours[name].default for name in ours if name in shared} == shared
    assert set(ours) - set(shared) == {"bundle", "on", "vs"}
