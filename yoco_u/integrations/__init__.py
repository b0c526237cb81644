"""Our checkpoints in other hosts."""
