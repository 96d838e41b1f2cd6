"""Making profiles: what kernels and collectives take, measured or told by compilers.

``grid`` says which kernels and collectives, ``live`` measures them on attached devices,
``compiled`` asks the compiler of devices that are not here, ``fit`` makes curves of the
seconds, ``make`` puts a :class:`~rhino_jax.cluster.profile.Profile` together.
"""
