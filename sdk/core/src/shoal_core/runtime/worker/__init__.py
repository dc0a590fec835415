"""What only worker processes do: how one begins, runs tasks, and hosts an actor."""
