"""Other processes of this device use the head that `shoal up` runs: over a Unix socket, without the network.

`unix_socket` says where it is, `frames` what is said on it, `server` answers for an engine, and `client`
is an engine that asks there.
"""
