"""Several processes under ``jax.distributed``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src import array, clusters, core
from jax._src import distributed as _distributed


def absent(
    shape: tuple[int, ...], dtype: Any, weak: bool, where: jax.sharding.Sharding
) -> jax.Array:
    """An array of which this process holds nothing: all of it is on other devices."""
    assert not where.addressable_devices, where
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.make_array_from_single_device_arrays(shape, where, [], dtype=dtype)
    aval = core.ShapedArray(shape, np.dtype(dtype), weak_type=weak)
    return array.ArrayImpl(aval, where, [], committed=True)


@dataclass(frozen=True)
class KeyValues:
    """The key-value store that the processes of ``jax.distributed`` share.

    It lives in process 0, and goes with it.
    """

    client: Any

    def set(self, key: str, value: bytes) -> None:
        self.client.key_value_set_bytes(key, value, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> bytes | None:
        """The value, waited for; None where it does not come in time."""
        try:
            found = self.client.blocking_key_value_get_bytes(key, int(seconds * 1000))
            return bytes(found)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def count(self, key: str) -> int:
        """How often this was asked for this key."""
        return int(self.client.key_value_increment(key, 1))

    def under(self, folder: str) -> dict[str, bytes]:
        """All that is kept under "folder/", by its whole key."""
        return dict(self.client.key_value_dir_get_bytes(folder))


def key_values() -> KeyValues | None:
    """The store of this run; None where ``jax.distributed`` is not started."""
    client = _distributed.global_state.client
    return None if client is None else KeyValues(client)


def process_id() -> int:
    """The rank given to ``jax.distributed``; no backend is started to know it."""
    return _distributed.global_state.process_id


def cluster_detected() -> str:
    """The launcher by which ``jax.distributed`` finds the other processes ("slurm",
    "ompi", "k8s", ...); "" where there is none."""
    for kind in clusters.ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and kind.is_env_present():
            return kind.name or kind.__name__
    return ""
