"""How a pipeline runs: chunks and a schedule as tasks, and who carries them out."""
