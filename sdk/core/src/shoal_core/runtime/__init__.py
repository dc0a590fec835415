"""What drivers and worker processes run.

Every process has one ``Runtime``: an event loop (``reactor``), the bus and the channels (``session``), on which all
state changes. User threads only leave commands there, and read values that are ready. Its parts: ``tasks`` is what a
process asks for, ``worker`` what it does for others, ``ownership`` the references and ``data`` the values they stand
for, ``loop`` how it waits, ``reports`` what it tells.
"""
