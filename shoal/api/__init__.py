"""The public API: remote functions, actors, `init`, `get` and their like.

Owns everything that a user's program sees, and nothing else: it checks arguments, turns options into templates, and
hands both to the current `Runtime` (`shoal.runtime.slot`). It never sends a message itself.

    words.py            "did you mean"
    signatures.py       does a call fit the parameters
    strategies.py       where things may run
    options.py          what the decorator and `.options()` accept
    remote_call.py      types of `.remote(...)`
    remote_function.py  `@remote` on a function
    actor.py            `@remote` on a class, handles, methods
    decorator.py        `remote` itself
    initialize.py       `init`, `shutdown`
    calls.py            `get`, `put`, `wait`, `cancel`, `kill`, `get_actor`
    cluster.py          `nodes`, `cluster_resources`, `available_resources`
    context.py          `get_runtime_context`, `get_gpu_ids`
    mypy_plugin.py      types of actor methods, for mypy
"""
