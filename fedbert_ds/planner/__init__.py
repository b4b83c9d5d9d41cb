"""The capacity planner: the pipeline queue itself, on a clock that jumps from event to event."""
