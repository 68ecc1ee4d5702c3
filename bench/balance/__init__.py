"""What layers that move while answers run are worth: the same events with and without moves, in turns.

    figures   of the times at which tokens came: speeds, gaps, tokens lost
    play      one run: a coordinator, streams that decode, and what happens to the devices meanwhile
    scenes    the events, and the figures of each

`python -m bench.balance` is the command line.
"""
