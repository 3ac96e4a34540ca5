"""``post bench speed``: how near the hardware's limit POST is, and how far ahead of plain references.

Each part runs POST's way and the reference's in turn, in one process, on the same model and batch, with the machine's
matrix rate measured between them. A ratio is the median over the rounds of each round's own ratio, so that a machine
that is busy for a while slows both sides of a pair.
"""
