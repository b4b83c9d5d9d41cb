"""How client halves are kept together: summed gradients or averaged weights."""
