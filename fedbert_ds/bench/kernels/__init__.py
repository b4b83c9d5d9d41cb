"""`fedbert-ds bench kernels`: each fused kernel beside the other ways to compute the same."""
