"""Measuring: every engine in a process of its own, ours and peers, against each other and the machine's ceilings."""
