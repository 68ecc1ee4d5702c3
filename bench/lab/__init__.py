"""The lab: devices that differ, on one machine, whose speed, memory and links change on command.

    spec      what a TOML file describes
    ground    network namespaces, link rates and memory cgroups: laid out, changed, removed
    air       the process that delays what goes over the links, and cleans up when the lab is gone
    lab       nodes on that ground: `with Lab.open(spec, model) as lab`
    compare   our plan and the equal split, predicted beside measured

`python -m bench.lab` is the command line. As root on Linux; without, the lab says in one line what it lacks.
"""
