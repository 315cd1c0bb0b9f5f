"""Empirical NTK Gram matrices: exact, from layer hooks where a rule exists and from autograd elsewhere."""
