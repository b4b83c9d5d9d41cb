"""What a rank does next, as pure decisions: no tensors, network, threads or clock."""
