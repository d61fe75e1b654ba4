"""The command line. ``main`` is the ``edgemesh`` command; each other module is one family of commands.

Importing this must stay cheap: nothing here or in a command's module imports the network, the terminal
view or the model code before a command needs it.
"""

from node.cli.main import main

__all__ = ["main"]
