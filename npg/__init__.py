"""Natural gradients: one exact Fisher, one conjugate gradient, one trust region, for classifiers and for policies."""
