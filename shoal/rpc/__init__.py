"""Messages on the wire: framing, authentication, and the two kinds of connection.

    messages.py  the base of all messages and those that open a connection
    frames.py    pure: bytes <-> frames of messages
    auth.py      pure: the mutual challenge over the cluster's token
    sockets.py   addresses, listening sockets, handing an accepted socket to another process
    aio.py       connections of the processes that run asyncio (control, agent, tools)
    reactor.py   connections of drivers and workers: one thread beside the user's, no asyncio

Whoever asks: every room above. It asks nobody.
"""
