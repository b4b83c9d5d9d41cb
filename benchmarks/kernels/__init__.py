"""Each fused kernel beside more baselines than `fedbert-ds bench kernels` has."""
