"""Chunks of an assignment as jitted programs, each on the devices of its stage."""
