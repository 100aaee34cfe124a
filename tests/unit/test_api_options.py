"""Every option is checked where it is written, and its error says what to do."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from shoal.api.options import (
    ACTOR_OPTIONS,
    TASK_OPTIONS,
    actor_template,
    check_options,
    check_runtime_env,
    task_template,
    variant_key,
)
from shoal.api.strategies import Exists, In, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, NotIn
from shoal.runtime.interface import ActorTemplate, TaskTemplate
from shoal.scheduling.views import Strategy

NODE = "ab" * 28


def plain() -> None: ...


class Plain: ...


def task(**options: Any) -> TaskTemplate:
    return task_template(plain, check_options(TASK_OPTIONS, options, where="here"))


def actor(**options: Any) -> ActorTemplate:
    return actor_template(Plain, {}, check_options(ACTOR_OPTIONS, options, where="here"), is_async=False, handle=b"")


def test_task_defaults() -> None:
    template = task()
    assert template.resources == {"CPU": 10_000}
    assert (template.num_returns, template.max_retries, template.max_calls) == (1, 3, 0)
    assert template.retry_exceptions is False
    assert template.timeout_s == task(timeout_s=None).timeout_s == 0.0
    assert task(timeout_s=3).timeout_s == 3.0
    assert template.strategy == Strategy()
    assert template.name == "plain"
    assert template.env_vars == {}


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        ({"num_cpus": 0}, {}),
        ({"num_cpus": 0.5}, {"CPU": 5_000}),
        ({"num_gpus": 1}, {"CPU": 10_000, "GPU": 10_000}),
        ({"memory": 100}, {"CPU": 10_000, "memory": 1_000_000}),
        ({"resources": {"a": 2, "b": 0}}, {"CPU": 10_000, "a": 20_000}),
        ({"accelerator_type": "A100"}, {"CPU": 10_000, "accelerator_type:A100": 10}),
        ({"num_cpus": None, "num_gpus": None, "resources": None, "memory": None}, {"CPU": 10_000}),
    ],
)
def test_task_resources(options: dict[str, Any], resources: dict[str, int]) -> None:
    assert task(**options).resources == resources


@pytest.mark.parametrize(
    ("options", "held", "placed"),
    [
        ({}, {}, {"CPU": 10_000}),
        ({"num_cpus": 0}, {}, {}),
        ({"num_cpus": 2}, {"CPU": 20_000}, {"CPU": 20_000}),
        ({"num_gpus": 1}, {"CPU": 10_000, "GPU": 10_000}, {"CPU": 10_000, "GPU": 10_000}),
        ({"num_gpus": 1, "num_cpus": 0}, {"GPU": 10_000}, {"GPU": 10_000}),
        ({"resources": {}}, {}, {"CPU": 10_000}),
        ({"resources": {"x": 1}}, {"CPU": 10_000, "x": 10_000}, {"CPU": 10_000, "x": 10_000}),
    ],
)
def test_actor_resources(options: dict[str, Any], held: dict[str, int], placed: dict[str, int]) -> None:
    template = actor(**options)
    assert template.resources == held
    assert template.placement == placed


def test_a_task_with_a_gpu_ends_its_worker() -> None:
    assert task(num_gpus=1).max_calls == 1
    assert task(num_gpus=1, max_calls=0).max_calls == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_cpu": 1}, ValueError, "Did you mean 'num_cpus'?"),
        ({"max_restarts": 1}, ValueError, "it is an option of actors"),
        ({"num_cpus": -1}, ValueError, "0 or more"),
        ({"num_cpus": "2"}, TypeError, "a number"),
        ({"num_cpus": True}, TypeError, "a number"),
        ({"num_cpus": float("nan")}, ValueError, "0 or more"),
        ({"num_cpus": 0.00001}, ValueError, "num_cpus"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus=1"),
        ({"resources": {"GPU": 1}}, ValueError, "num_gpus=1"),
        ({"resources": {"memory": 1}}, ValueError, "memory=1"),
        ({"resources": [1]}, TypeError, "a dict"),
        ({"resources": {"x": -1}}, ValueError, "x"),
        ({"num_returns": -1}, ValueError, "num_returns"),
        ({"_generator_backpressure_num_objects": 0}, ValueError, "1 or more, or -1"),
        ({"_generator_backpressure_num_objects": "2"}, TypeError, "a whole number"),
        ({"_num_objects_per_yield": 0}, ValueError, "1 or more"),
        ({"num_returns": "many"}, ValueError, "whole number"),
        ({"num_returns": 1.5}, TypeError, "whole number"),
        ({"max_retries": -2}, ValueError, "max_retries"),
        ({"max_retries": True}, TypeError, "whole number"),
        ({"retry_exceptions": [3]}, TypeError, "exception classes"),
        ({"retry_exceptions": "all"}, TypeError, "exception classes"),
        ({"timeout_s": 0}, ValueError, "above 0"),
        ({"timeout_s": -1.5}, ValueError, "above 0"),
        ({"timeout_s": float("nan")}, ValueError, "above 0"),
        ({"timeout_s": float("inf")}, ValueError, "None for no limit"),
        ({"timeout_s": "1s"}, TypeError, "a number of seconds"),
        ({"timeout_s": True}, TypeError, "a number of seconds"),
        ({"name": 3}, TypeError, "a string"),
        ({"scheduling_strategy": "FAST"}, ValueError, "'SPREAD'"),
        ({"scheduling_strategy": 3}, TypeError, "strategy object"),
        ({"label_selector": {"a": "b c"}}, ValueError, "'label_selector': label 'a': the condition 'b c' is none of"),
        ({"label_selector": {"a": "in()"}}, ValueError, "none of 'value'"),
        ({"label_selector": {"a/b/c": "d"}}, ValueError, "DNS name"),
        ({"label_selector": {"a": 1}}, TypeError, "a string, not 1"),
        ({"label_selector": "a"}, TypeError, "a dict of label names"),
        ({"fallback_strategy": [{"zone": "a"}]}, ValueError, "'label_selector' and nothing else"),
        ({"fallback_strategy": {"label_selector": {}}}, TypeError, "a list of dicts"),
        ({"priority": 1.5}, TypeError, "whole number"),
        ({"priority": 2**40}, ValueError, "between"),
        ({"placement_group": object()}, TypeError, "is what placement_group"),
        ({"runtime_env": {"pip": ["x"]}}, NotImplementedError, "pip"),
        ({"runtime_env": {"envvars": {}}}, ValueError, "Did you mean 'env_vars'?"),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError, "quote the value"),
        ({"runtime_env": {"env_vars": {"A=B": "1"}}}, ValueError, "environment"),
        ({"runtime_env": "x"}, TypeError, "a dict"),
    ],
)
def test_wrong_task_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="(?s)" + text.replace("?", r"\?")):
        task(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_returns": 2}, ValueError, "it is an option of tasks"),
        ({"lifetime": "forever"}, ValueError, "detached"),
        ({"get_if_exists": True}, ValueError, "needs a name"),
        ({"get_if_exists": 1}, TypeError, "True or False"),
        ({"max_concurrency": 0}, ValueError, "1 or more"),
        ({"max_restarts": -2}, ValueError, "max_restarts"),
        ({"name": ""}, ValueError, "not empty"),
        ({"namespace": 1}, TypeError, "a string"),
        ({"concurrency_groups": {"io": 0}}, ValueError, "the size of 'io' is 1 or more"),
        ({"concurrency_groups": {"io": 1.5}}, TypeError, "whole number"),
        ({"concurrency_groups": {"": 1}}, TypeError, "not a string, or empty"),
        ({"concurrency_groups": ["io"]}, TypeError, "a dict of names"),
        ({"max_pending_calls": 0}, ValueError, r"-1 \(no limit\), 1 or more"),
        ({"max_pending_calls": True}, TypeError, "whole number"),
        ({"allow_out_of_order_execution": False, "max_concurrency": 2}, ValueError, "order"),
    ],
)
def test_wrong_actor_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        actor(**options)


def test_where_and_when_it_may_run() -> None:
    assert task().priority is None
    assert task(priority=-3).priority == -3
    assert actor(priority=4).priority == 4
    wants = {
        "label_selector": {"a": "in(x, y)", "shoal.io/node-id": "!z"},
        "fallback_strategy": [{"label_selector": {}}],
    }
    both = {"a": "in(x,y)", "ray.io/node-id": "!z"}
    assert task(**wants).strategy == Strategy(labels=both, fallbacks=[{}])
    labelled = NodeLabelSchedulingStrategy({"b": Exists()}, soft={"b": NotIn("q")})
    strategy = task(**wants, scheduling_strategy=labelled).strategy
    assert strategy.labels == {"b": "exists()&!in(q)", **both}
    assert strategy.fallbacks == [{"b": "exists()", **both}, {"b": "exists()&!in(q)"}, {"b": "exists()"}]
    assert actor(**wants).strategy.labels == both
    for again in (pickle.loads(pickle.dumps(labelled)), labelled):
        assert task(scheduling_strategy=again).strategy == labelled._strategy


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: NodeLabelSchedulingStrategy({}), ValueError, "conditions in hard or soft"),
        (lambda: NodeLabelSchedulingStrategy({"a": "b"}), ValueError, "hard['a'] of NodeLabelSchedulingStrategy is In"),
        (lambda: NodeLabelSchedulingStrategy({"a": In("b c")}), ValueError, "none of 'value'"),
        (In, ValueError, "at least one value"),
        (lambda: NodeAffinitySchedulingStrategy(NODE, False, _spill_on_unavailable=True), ValueError, "soft=True"),
        (lambda: NodeAffinitySchedulingStrategy(NODE, True, _fail_on_unavailable=True), ValueError, "soft=False"),
    ],
)  # fmt: skip
def test_wrong_strategies(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make()


def test_the_defaults_of_what_comes_later_pass() -> None:
    task(label_selector=None, placement_group="default", placement_group_bundle_index=-1, _labels={})
    actor(concurrency_groups=None, max_pending_calls=-1, object_store_memory=0, enable_task_events=True)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"It knows .*num_cpus.*resources"):
        task(zzz=1)


def test_decorator_only_options() -> None:
    with pytest.raises(ValueError, match="only in the decorator"):
        check_options(TASK_OPTIONS, {"max_calls": 1}, where="f.options()")


def test_actor_options_arrive() -> None:
    template = actor(
        name="n", namespace="s", lifetime="detached", max_restarts=-1, max_task_retries=2, max_concurrency=5,
        get_if_exists=True, runtime_env={"env_vars": {"A": "1"}}, scheduling_strategy="SPREAD",
    )  # fmt: skip
    assert (template.name, template.namespace, template.detached) == ("n", "s", True)
    assert (template.max_restarts, template.max_task_retries, template.max_concurrency) == (-1, 2, 5)
    assert template.get_if_exists
    assert template.env_vars == {"A": "1"}
    assert template.strategy == Strategy("spread")
    assert actor().detached is None
    assert actor(lifetime="non_detached").detached is False


def test_node_affinity() -> None:
    node = "ab" * 28
    assert task(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).strategy == Strategy(
        "node", bytes.fromhex(node), True
    )
    with pytest.raises(ValueError, match="56 hex digits"):
        NodeAffinitySchedulingStrategy("ab", soft=False)
    with pytest.raises(ValueError, match="hex string"):
        NodeAffinitySchedulingStrategy("xy", soft=False)
    with pytest.raises(TypeError):
        NodeAffinitySchedulingStrategy(3, soft=False)  # type: ignore[arg-type]


def test_runtime_env() -> None:
    assert check_runtime_env(None) == {}
    assert check_runtime_env({"env_vars": {"A": "b"}, "pip": None}) == {"A": "b"}


def test_variant_keys() -> None:
    assert variant_key({"num_cpus": 1, "resources": {"a": 1}}) == variant_key({"resources": {"a": 1}, "num_cpus": 1})
    assert variant_key({"num_cpus": 1}) != variant_key({"num_cpus": True})
    assert variant_key({"resources": {"a": [1]}}) is None
    assert variant_key({"retry_exceptions": [ValueError]}) is not None
