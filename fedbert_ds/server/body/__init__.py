"""The transformer layers under DeepSpeed: forward, backward and step on the device."""
