"""The compiled way of a CPU stage, for tensors in usual types.

    opening.py     whether kernels can serve a plan
    stage.py       the stage of one worker
    operands.py    pieces as the kernels see them: addresses and types
    merging.py     blocks of a piece to blocks of the output
    measuring.py   samples, answers to questions, thresholds of small tensors
    refusing.py    what is wrong with a block that the kernels refuse

The kernels refuse a block in which an operand is not finite, or a result does not fit its type, and
nothing else: that is an error.
"""
