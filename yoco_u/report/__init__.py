"""One HTML page about runs: what they came to, beside each other. Start at `run_report.py`."""
