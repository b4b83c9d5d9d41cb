"""A rank's messages in and out: the gRPC endpoint, and threads that code and decode tensors."""
