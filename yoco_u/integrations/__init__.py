"""Other programs that run our checkpoints: today vLLM.

A checkpoint folder goes in, as training saves it, and the host's own engine answers with the same tokens as ours. Start at
`vllm/model.py`; docs/vllm.md says how to use it.
"""
