"""The HTTP server: OpenAI's API over one engine, and a page in the browser to try the model.

HTTP requests come in, JSON or server-sent events go out. Start reading at the routes in `app.py`. A request passes
`admission.py`, which refuses it or turns it into token ids and sampling parameters; `EngineLoop.submit` in `engine_loop.py`
makes it a job before that, and hands these to the engine; `completions.py` or `chat.py` turn the events of that job into the
answer.
"""
