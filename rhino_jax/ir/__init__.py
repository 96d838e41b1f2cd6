"""The Rhino IR: Programs, factors, layouts. Plain Python, no JAX."""
