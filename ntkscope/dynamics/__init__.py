"""From kernels and loss Hessians along a run to the dissipation Gramian, the propagator and the train and test motions."""
