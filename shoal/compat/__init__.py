"""Runs programs that say `import ray`, unchanged.

    shoal run script.py [args]          python -m shoal.compat script.py [args]

Owns the import hook that answers for `ray` and everything below it, and the face that runs a script under it. Nobody
asks this room; it shows what the rooms below have, by Ray's names.

    names.py     pure data: which module of shoal stands behind which module of Ray, and which names differ
    hook.py      the finder and the view modules; `install()`
    run.py       a script or module as `__main__`, as the interpreter itself would run it
    settings.py  RAY_ADDRESS and its like, read as SHOAL_ADDRESS
"""
