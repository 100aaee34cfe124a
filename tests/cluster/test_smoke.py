"""One breath of everything: if this fails, look here first."""

import shoal


@shoal.remote
def add(a: int, b: int) -> int:
    return a + b


def test_a_task_runs_in_a_local_cluster(local: object) -> None:
    assert shoal.get(add.remote(1, add.remote(2, 3))) == 6
