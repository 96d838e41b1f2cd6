"""Which profile a plan is priced with.

The option ``profile`` names one: a file, or "compile-only" for what the device's own
compiler says (of those that come with Rhino). Without it, plans for attached devices
use what ``rhino profile`` kept for them, if anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rhino_jax.cluster.profile import COMPILE_ONLY, SHIPPED, Profile, shipped
from rhino_jax.cluster.topology import Cluster
from rhino_jax.errors import ProfileError


def profile_place(folder: Path, devices: Sequence[Any]) -> Path:
    """Where a profile of ``devices`` is kept."""
    kinds = "/".join(sorted({device.device_kind for device in devices}))
    text = f"{kinds}/{len(devices)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / f"profile-{digest}.json"


def profiled(cluster: Cluster, asked: str) -> Cluster:
    """``cluster`` with the profile that is asked for ("" is none).

    Raises:
        ProfileError: no such file, a damaged one, one of other hardware; no profile of
            this device comes with Rhino.
    """
    if not asked:
        return cluster
    if asked != COMPILE_ONLY:
        return Profile.load(asked).merged(cluster)
    found = shipped(cluster.device.name, COMPILE_ONLY)
    if found is None:
        raise ProfileError(
            f"no compile-only profile of {cluster.device.name} comes with Rhino (of "
            f"{', '.join(SHIPPED)} one does); next: rhino profile --compile-only "
            f"{cluster.device.name}"
        )
    return found.merged(cluster)


def kept_profile(
    cluster: Cluster, devices: Sequence[Any], folder: Path | None
) -> Cluster:
    """``cluster`` with the profile kept for ``devices``, if there is one."""
    if folder is None:
        return cluster
    place = profile_place(folder, devices)
    return Profile.load(place).merged(cluster) if place.exists() else cluster
