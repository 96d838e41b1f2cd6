"""From a Program and prices to a Plan. Plain Python and numpy, no JAX."""
