"""Results in other people's formats: datasets of xarray, kernels and transformers of scikit-learn; each file needs what it makes."""
