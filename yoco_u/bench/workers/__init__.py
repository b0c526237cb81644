"""The workers: one script per engine, which runs it and times it in a process of its own, as `worker_protocol.py` describes."""
