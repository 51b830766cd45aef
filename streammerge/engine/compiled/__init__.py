"""The compiled way of a CPU stage, for tensors in usual types.

    opening.py     the stage of a worker on the CPU: this one, or the plain one
    stage.py       the stage of one worker
    operands.py    pieces as the kernels see them: addresses and types
    merging.py     blocks of a piece to blocks of the output
    measuring.py   samples, answers to questions, thresholds of small tensors
    refusing.py    what is wrong with a block that the kernels refuse

The kernels refuse a block in which an operand is not finite, or a result does not fit its type, and
nothing else: that is an error.
"""
