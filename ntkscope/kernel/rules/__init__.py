"""Layer rules: from what a layer saw to the factors of its Jacobian. One file per layer family.

A rule turns one call into `PositionFactor`s. With activations a (examples, positions, inputs) and output gradients
d (examples, classes, positions, units), the gradient of output (i, c) with respect to the weight is

    sum over t of  outer(d[i, c, t, :], a[i, t, :])        # [units, inputs], the layout of the flattened weight slice

A Linear on plain rows has one position; a convolution has one per output pixel; a module called twice has its calls' positions
side by side, because its gradient is their sum.
"""
