"""A process's part in the cluster: submitting calls, owning what comes of them, and running calls for others.

Owned here: the states of objects that this process made or borrowed, the calls on their way, the leases and actors it
uses.
Who asks: `shoal.api`, through the `Runtime` protocol (`interface.py`) and the one `slot.py`.
It asks: this node's agent (`shoal.node.messages`), control through it (`shoal.control.messages`), and workers directly
(`messages.py`).

    owner's side     connection <- references <- waiting <- core        one object, built in layers (`CoreRuntime`)
                     arrivals                                           references as they become ready
                     leases, link, actor_client, task_run               which worker gets which call
    worker's side    worker, executor, calls, execution                 calls in, results out
                     actor_host, async_actor, worker_exit
    a driver's       bootstrap, init_request, driver_output, progress, job_logging
"""
