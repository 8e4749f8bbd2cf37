"""Measure a bundle on a device, and keep the result in the bundle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, overload

from edgekit.devices.database import get_device
from edgekit.errors import InputError
from edgekit.runtime import profiler
from edgekit.runtime.bundle import Bundle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.runtime.profiler import Profile, ProfileComparison

BundleLike = str | os.PathLike[str] | Bundle


@overload
def profile(
    bundle: BundleLike,
    *,
    on: str = ...,
    vs: None = ...,
    backend: str | None = ...,
    threads: int | None = ...,
    kernels: str | os.PathLike[str] = ...,
    vs_kernels: str | os.PathLike[str] | None = ...,
    sizes: Mapping[str, int] | None = ...,
    runs: int | None = ...,
    warmup: int | None = ...,
    min_seconds: float = ...,
    max_seconds: float = ...,
    ops: bool = ...,
    seed: int = ...,
) -> Profile: ...


@overload
def profile(
    bundle: BundleLike,
    *,
    on: str = ...,
    vs: BundleLike,
    backend: str | None = ...,
    threads: int | None = ...,
    kernels: str | os.PathLike[str] = ...,
    vs_kernels: str | os.PathLike[str] | None = ...,
    sizes: Mapping[str, int] | None = ...,
    runs: int | None = ...,
    warmup: int | None = ...,
    min_seconds: float = ...,
    max_seconds: float = ...,
    ops: bool = ...,
    seed: int = ...,
) -> ProfileComparison: ...


def profile(
    bundle: BundleLike,
    *,
    on: str = "local",
    vs: BundleLike | None = None,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    vs_kernels: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    runs: int | None = None,
    warmup: int | None = None,
    min_seconds: float = 0.5,
    max_seconds: float = 5.0,
    ops: bool = True,
    seed: int = 0,
) -> Profile | ProfileComparison:
    """Measure latency, memory and ops of a bundle, alone or in turns with a rival.

    The result goes into the bundle's `report.json`, as the section `profile`, and with a rival also as
    `comparison`; where the bundle is packed or read-only it is only returned. The rival's files stay as they are.

    Args:
        bundle: a bundle's folder or packed file, or an opened `Bundle`.
        on: the device, one of `list_devices()`.
        vs: a rival bundle to measure in turns with this one; the result is then a `ProfileComparison`.
        backend: the name of a backend; None takes the first that fits the bundle's target.
        threads: threads for one run; None leaves it to the backend.
        kernels: as for `edgekit.load`.
        vs_kernels: the rival's; None for the same.
        sizes: values of symbolic dimensions, such as `{"N": 4}`.
        runs: exactly so many timed runs; None: as many as a precise median needs.
        warmup: exactly so many untimed runs, at least 1; None: until the latency has settled.
        min_seconds, max_seconds: bounds on the time of the timed runs, per bundle.
        ops: also time every node.
        seed: draws the order of the turns and the bootstrap's samples; without a rival it has no effect.

    Raises:
        UnknownNameError: no such device or backend.
        InputError: counts or threads below 1, times that are not positive, or sizes that the bundle does not take.
        BundleError: a bundle is damaged, unsafe or newer than this edgekit.
    """
    get_device(on)
    opened = Bundle.open(bundle)
    if vs is None:
        if vs_kernels is not None:
            raise InputError("vs_kernels are those of the rival; name it with vs, which may be the same bundle")
        result = profiler.profile(
            opened,
            backend=backend,
            threads=threads,
            kernels=kernels,
            sizes=sizes,
            runs=runs,
            warmup=warmup,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            ops=ops,
        )
        opened.add_to_report("profile", result.to_json())
        return result
    comparison = profiler.profile_pair(
        opened,
        vs,
        backend=backend,
        threads=threads,
        kernels=kernels,
        vs_kernels=vs_kernels,
        sizes=sizes,
        runs=runs,
        warmup=warmup,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        ops=ops,
        seed=seed,
    )
    opened.add_to_report("profile", comparison.a.to_json())
    opened.add_to_report("comparison", comparison.to_json())
    return comparison
