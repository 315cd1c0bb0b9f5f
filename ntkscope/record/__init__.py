"""Recording a training run as snapshots of outputs and kernels, and reading such records back."""
