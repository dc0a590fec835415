"""The node's shared memory: its segments, what is pulled and lent, what goes to the durable tier and comes back."""
