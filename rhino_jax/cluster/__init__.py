"""What a plan runs on: devices, links, clusters. Figures with their sources, no JAX."""
