"""Loss of a body whose matrix products are in fp8."""
