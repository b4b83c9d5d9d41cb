"""What crosses between client and server: typed messages, tensor codecs, channels."""
