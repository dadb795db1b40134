"""One grammar for the terminal, the magics and `%docker`: docker's commands, and ours beside them.

`tree.ROOT` is the whole of it; `grammar.invoke` runs one line. This file imports nothing, so that a module here costs
only what it needs.
"""
