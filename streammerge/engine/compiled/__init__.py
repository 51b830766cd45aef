"""What a CPU stage leaves to the compiled kernels: blocks in usual types that turn out to be finite.

    opening.py     whether they can serve a plan
    operands.py    pieces as the kernels see them: addresses and types
    merging.py     blocks of a piece to blocks of the output
    measuring.py   samples, answers to questions, thresholds of small tensors

Each says what it left undone. That is done the plain way, which gives the same bits, and names what
is wrong where something is.
"""
