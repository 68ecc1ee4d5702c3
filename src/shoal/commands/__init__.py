"""One module per command: `add_parser` describes its arguments, `run` carries it out and returns the exit
code.

A module imports what is heavy only inside `run`. It raises ShoalError for whatever the user can mend; the
command line prints that and exits with its code.
"""
