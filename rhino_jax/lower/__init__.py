"""From Program and Plan to a compiled program: the JAX half of Rhino."""
