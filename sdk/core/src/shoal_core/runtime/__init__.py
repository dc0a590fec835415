"""What drivers and worker processes run: ownership, submission, objects, execution.

Every process has one ``Runtime``: an I/O thread with an event loop, the bus and the channels, on which all state
changes. User threads only put commands on queues and read values that are ready.
"""
