"""Kernels written in JAX, for where the vendor's are not: as exact, not as fast."""
