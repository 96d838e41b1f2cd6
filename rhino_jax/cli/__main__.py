"""``python -m rhino_jax.cli`` is ``rhino``."""

from rhino_jax.cli import main

if __name__ == "__main__":
    main()
