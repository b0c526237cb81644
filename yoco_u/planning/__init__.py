"""Planning: what architectures cost and how fast they can be on given hardware, by arithmetic alone.

In go architectures (`candidates.py`), a machine (`hardware.py`) and what is planned for (`PlanSettings`); out comes a `Plan`,
the figures of every architecture at every context length, as a table, JSON or PNG. Start at `plan.py`; the rates are in
`roofline.py`. Nothing here needs torch except `this_machine.py`, which measures the machine that the command runs on.
"""
