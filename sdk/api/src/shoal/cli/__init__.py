"""The command line: ``shoal up``, ``down``, ``status``, ``why``, ``list``, ``logs``, ``job``, ``drain`` and more.

==========  ===========================================================
exit code   meaning
==========  ===========================================================
0           done
1           it could not be done; the text says why
2           the command line is wrong
3           the cluster cannot be reached
==========  ===========================================================
"""

from shoal.cli.commands import app, main

__all__ = ["app", "main"]
