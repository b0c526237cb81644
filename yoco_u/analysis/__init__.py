"""Comparing runs: planning a comparison, running it, and the report."""
