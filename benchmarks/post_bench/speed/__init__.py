"""``post bench speed``: POST's speed relative to the hardware's limit and to plain reference implementations.

Each part alternates POST's implementation and the reference in one process, on the same model and batch, and measures
the machine's matrix rate in between. A ratio is the median of the rounds' own ratios, so that temporary load on the
machine slows both sides of a pair.
"""
