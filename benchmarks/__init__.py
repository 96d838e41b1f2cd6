"""Models and scripts behind the figures of this project."""
