"""One script an engine, each run by itself: `python transformers_llama.py`, see worker_protocol."""
