"""The gated-Adam step, shared by the optimizer and whatever audits its decisions."""
