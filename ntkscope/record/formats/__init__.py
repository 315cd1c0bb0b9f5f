"""File formats of checkpoints, one per file, read without running any of their code."""
