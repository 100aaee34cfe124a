"""Control: the head's picture of the cluster, and what it decides about it.

Owns nodes, jobs, actors (their life, name and place), the key-value store and the routing of logs. One process runs it;
agents report to it, processes and tools ask it through messages (`messages.py`). It never runs user code and never
unpickles user data.

    server.py      the asynchronous shell: connections and one timer
    state.py       the state machine that the shell feeds: a message or a tick in, messages out
    actors.py      the table of an actor's life and the record of one actor
    placement.py   which actors wait, in which lines, and where the next one goes
    nodes.py       who is in the cluster, what is free there, and what was booked there a moment ago
    jobs.py names.py keys.py metrics.py remembered.py settings.py   the small tables
"""
