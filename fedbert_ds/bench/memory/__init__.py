"""What a micro-batch in flight keeps: counted, not measured."""
