"""What a process asks the cluster for: tasks, actors and their calls, placement groups."""
