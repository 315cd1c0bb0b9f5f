"""Layer rules: from one use of a weight to its share of the Jacobian. One file per layer family.

A rule is a function `rule(watch, func, args, kwargs) -> Seen` for one torch function (`table.RULES`). It makes the call, and describes
what it saw as uses of weights (`use.py`): with activations a (examples, positions, inputs) and output gradients d (examples, units,
positions) of one output class, the gradient with respect to the weight is

    sum over t of  outer(d[i, :, t], a[i, t, :])        # [units, inputs], the weight as a matrix (first axis, rest)

A Linear on plain rows has one position, a convolution one per output pixel, an Embedding one per token; a weight used twice has the
positions of both uses side by side, because its gradient is their sum. Weights that only scale or shift have no such factors: their
gradient rows are as small as they are, and are formed at once.
"""
