"""cuDNN's attention: whether it is here, and its primitives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention

CUDNN_VERSION = 91200
"""The cuDNN that a machine is taken to have that can not be asked."""


def cudnn_runs() -> bool:
    """Whether this machine has cuDNN and a GPU to run it."""
    return jax.default_backend() == "gpu" and _cudnn_found()


def _cudnn_found() -> bool:
    try:
        return bool(cudnn_attention.check_cudnn_version())
    except RuntimeError:
        return False


def cudnn_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of attention as plain data, as cuDNN's primitives have them."""
    mask = cudnn_attention.MaskType[params["mask_type"]]
    own = {key: x for key, x in params.items() if key != "vendor"}
    return {**own, "mask_type": mask}


def cudnn_bind(kind: str, args: Sequence[Any], params: dict[str, Any]) -> Any:
    """One of cuDNN's attention primitives, by name."""
    known = (
        cudnn_attention._dot_product_attention_fwd_p_wrapper,
        cudnn_attention._dot_product_attention_bwd_p_wrapper,
    )
    (primitive,) = (p for p in known if p.name == kind)
    return primitive.bind(*args, **params)


@contextlib.contextmanager
def cudnn_traceable() -> Iterator[None]:
    """Let ``jax.nn.dot_product_attention(implementation="cudnn")`` be traced here.

    JAX asks for cuDNN's version when it traces, to tell which heads it can do; where
    there is none it can not plan for machines that have one. It is answered for as long
    as this lasts, in this thread and others, and only where nothing else would be.
    """
    if _cudnn_found():
        yield
        return
    asked = cudnn_attention.check_cudnn_version
    cudnn_attention.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        cudnn_attention.check_cudnn_version = asked
