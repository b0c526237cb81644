"""The HTTP API that speaks OpenAI's language, and the page. Start at `app.py`; `engine_loop.py` is what it stands on."""
