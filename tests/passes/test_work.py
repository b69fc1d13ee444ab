"""Tables whose units are kept in a checkpoint, or shared by processes, are those of one process."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mpq_fx.checkpoint import Journal
from mpq_fx.errors import CalibrationError, MpqError, ProcessError
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze.metric import Single, Task, averaged
from mpq_fx.passes.analyze.metrics import interlayer_loss
from mpq_fx.passes.analyze.metrics.interlayer_loss import Response
from mpq_fx.passes.analyze.metrics.measured_pairs import measured_pairs
from mpq_fx.passes.analyze.metrics.measured_singles import measured_singles
from mpq_fx.passes.analyze.ranking import predicted
from mpq_fx.processes import ALONE, Processes
from mpq_fx.sharing import Sharing, shares
from tests.architectures import values
from tests.passes.conftest import BF16, subject
from tests.passes.test_metrics import INT4, INT8, planted, task_of
from tests.test_checkpoint import numbers, stop_after


def shared(path: Path | None, task: Task, name: str):
    """(table, how many units the file had)"""
    journal = Journal(path)
    try:
        table = METRICS[name](replace(task, work=Sharing(ALONE, journal, 0)))
    finally:
        journal.close()
    return table, table.provenance.get("resumed", 0)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_goes_on_after_a_stop_and_ends_with_the_same_table(
    net, name, tmp_path, monkeypatch
):
    task = task_of(net, INT8, INT4, BF16)
    whole = METRICS[name](task)
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            shared(tmp_path / "c", task, name)
    table, resumed = shared(tmp_path / "c", task, name)
    assert resumed == 1
    assert numbers(table) == numbers(whole)


def test_what_is_known_is_not_measured_again(net, tmp_path, monkeypatch):
    task = task_of(net, INT8, INT4, BF16)
    whole, _ = shared(tmp_path / "c", task, "measured_pairs")
    monkeypatch.setattr(type(task.replay), "run", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(type(task.replay), "finish", lambda *args: pytest.fail("measured again"))
    again, resumed = shared(tmp_path / "c", task, "measured_pairs")
    assert numbers(again) == numbers(whole)
    assert resumed == len(task.units) * len(task.records)


def test_a_table_that_time_cut_short_gets_the_rest_in_the_next_tune(tmp_path):
    net = planted(1.0, 1.0, 1.0)
    late = replace(task_of(net, INT4, INT8), deadline=time.monotonic() - 1)
    cut, _ = shared(tmp_path / "c", late, "measured")
    assert cut.provenance["estimated"]
    assert cut.provenance["records"] == 1
    table, resumed = shared(tmp_path / "c", task_of(net, INT4, INT8), "measured")
    assert resumed == 1
    assert numbers(table) == numbers(measured_singles(task_of(net, INT4, INT8)))


def test_past_the_deadline_the_calls_that_are_known_still_count(net, tmp_path):
    task = task_of(net, INT8, INT4)
    whole, _ = shared(tmp_path / "c", task, "measured")
    late = replace(task, deadline=time.monotonic() - 1)
    assert numbers(shared(tmp_path / "c", late, "measured")[0]) == numbers(whole)


def test_a_call_is_not_begun_for_which_what_is_left_takes_too_long(net, tmp_path, monkeypatch):
    """The times of units are kept, so a call that was known counts as what it once took."""
    task = task_of(net, INT8)
    append = Journal.append
    slow = {"seconds": 100.0}
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", lambda j, at, facts, x: append(j, at, slow, x))
        first = replace(task, records=task.records[:1])
        shared(tmp_path / "c", first, "measured")
    soon = replace(task, deadline=time.monotonic() + 100)
    assert shared(tmp_path / "c", soon, "measured")[0].provenance["records"] == 1
    later = replace(task, deadline=time.monotonic() + 100 * len(task.units) + 10)
    assert shared(tmp_path / "c", later, "measured")[0].provenance["records"] > 1


def test_the_order_of_a_predicted_sum_does_not_hang_on_hashes(net):
    """Sets of names are in another order in every process; sums of floats round differently."""
    task = task_of(net, INT8)
    table = measured_pairs(task)
    names = [f"site {k}" for k in range(64)]
    values = {(name, "int8*float32"): 0.1 / (k + 3) for k, name in enumerate(names)}
    expected = 0.0
    for value in values.values():
        expected += value
    plan = dict.fromkeys(names, INT8)
    assert predicted(replace(table, values=values, pairs={}), plan) == expected**0.5


def deep(x, a, b, c, d, e):
    """Five linear sites behind each other, two of which read one tensor."""
    y = functional.gelu(functional.linear(x, a))
    y = functional.linear(y, b) + functional.linear(y, c).tanh()
    return (functional.linear(functional.gelu(functional.linear(x + y, d)), e),)


def two(x, a, b):
    return (functional.linear(functional.gelu(functional.linear(x, a)), b),)


def in_processes(size: int, run) -> list:
    """run(Processes) of each of `size` threads that exchange as processes do; errors as results."""
    barrier, given, found = threading.Barrier(size, timeout=20), [None] * size, [None] * size

    def gather(rank: int):
        def gathered(value):
            given[rank] = value
            barrier.wait()
            seen = [*given]
            barrier.wait()
            return seen

        return gathered

    def one(rank: int) -> None:
        processes = Processes(rank, size, gather(rank), gather(rank))
        try:
            found[rank] = run(processes)
        except MpqError as error:
            found[rank] = error
        except BaseException as error:
            found[rank] = error
            barrier.abort()  # as connections close

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def spread(task: Task, name: str, processes: Processes, journal: Journal | None = None):
    return METRICS[name](replace(task, work=Sharing(processes, journal, 0)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_one_table_for_any_number_of_processes(name, size):
    task = deep_task()
    whole = numbers(METRICS[name](task))
    for table in in_processes(size, lambda p: spread(task_of_copy(task), name, p)):
        told = {k: v for k, v in table.provenance.items() if k != "processes"}
        assert numbers(replace(table, provenance=told)) == whole
        assert table.provenance["processes"] == size


def task_of_copy(task: Task) -> Task:
    """Processes share no cache of weights."""
    return replace(task, replay=replace(task.replay, weights={}))


def deep_task() -> Task:
    weights = [values(16, 16, k)[..., 0] / 4 for k in range(1, 6)]
    net = subject(deep, weights, 5, 16)
    return task_of(net, INT8, INT4, ties=((net.sites[1].name, net.sites[2].name),))


def wide_task() -> Task:
    """Outputs of more numbers than are kept, each of a weight of its own in the loss."""
    weights = [values(16, 16, 1)[..., 0] / 4, values(2048, 16, 2)[..., 0] / 4]
    net = subject(two, weights, 16, 16)
    task = task_of(net, INT8, INT4)
    curvature = torch.logspace(-3, 3, 16 * 2048, dtype=torch.float64).reshape(16, 2048)

    def bent(outputs):
        return (outputs[0].square() * curvature.to(outputs[0])).sum()

    return replace(task, losses=[bent] * len(task.records))


@pytest.mark.parametrize("make", [deep_task, wide_task])
def test_a_loss_has_both_its_tables_in_processes_and_after_a_stop(make, tmp_path, monkeypatch):
    task, metric = make(), METRICS["interlayer_loss"]
    whole = [numbers(table) for table in metric.measure(task)]

    def run(processes):
        work = Sharing(processes, None, 0)
        return metric.measure(replace(task_of_copy(task), work=work))

    for tables in in_processes(2, run):
        for table, wanted in zip(tables, whole, strict=True):
            told = {k: v for k, v in table.provenance.items() if k != "processes"}
            assert numbers(replace(table, provenance=told)) == wanted
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            shared(tmp_path / "c", task, "interlayer_loss")
    with closing(Journal(tmp_path / "c")) as journal:
        again = metric.measure(replace(task, work=Sharing(ALONE, journal, 0)))
    assert again[0].provenance["resumed"] == 1
    assert [numbers(table) for table in again] == whole
    assert whole[0][1], "pairs"


def test_the_noise_beside_a_loss_is_that_of_the_singles_ties_included():
    task = deep_task()
    _, noise = METRICS["interlayer_loss"].measure(task)
    assert noise.values == pytest.approx(measured_singles(task).values, rel=1e-6)


@pytest.mark.parametrize(("make", "is_sketched"), [(deep_task, False), (wide_task, True)])
def test_a_long_error_tells_that_its_products_are_estimates(make, is_sketched, monkeypatch):
    """What is small beside the products of norms may then be the sketch's own."""
    found, cross = [], interlayer_loss._cross

    def noted(seen, given):
        cross(seen, given)
        found.append((seen.chances[-1], [Response.of(single.row) for single in given]))

    monkeypatch.setattr(interlayer_loss, "_cross", noted)
    METRICS["interlayer_loss"](make())
    for chances, responses in found:
        assert [one.is_sketched for one in responses] == [is_sketched] * len(responses)
        assert bool((chances > 0).all() if is_sketched else (chances == 0).all())


@given(st.floats(0, 1e300), st.tuples(*[st.booleans()] * 3), st.integers(0, 9))
def test_what_a_single_did_to_a_loss_is_read_from_its_row_bit_by_bit(noise, flags, length):
    error, bent = torch.randn(length), torch.randn(length)
    one = Response.of(Response(error, bent, noise, *flags).row())
    assert torch.equal(one.error, error)
    assert torch.equal(one.bent, bent)
    assert (one.noise, one.is_changed, one.is_felt, one.is_sketched) == (noise, *flags)


def test_a_power_that_is_not_finite_is_refused_by_those_who_did_not_measure_it(tmp_path):
    task = deep_task()
    last = task.units[-1]

    def each(record, is_wanted):
        for unit, choice in task.changes(is_wanted):
            yield Single(unit, choice, float("inf") if unit == last else 1.0)

    def run(processes):
        work = Sharing(processes, None, 0)
        averaged("planted", replace(task_of_copy(task), work=work), each, forward_passes=1.0)

    for error in in_processes(2, run):
        assert isinstance(error, CalibrationError)
        assert error.what.startswith("planted finds inf for a linear in int8*float32: ")


@pytest.mark.parametrize("name", ["interlayer_hessian", "measured_pairs", "fisher"])
def test_each_unit_is_measured_by_one_process(name, monkeypatch):
    task, seen = deep_task(), []
    measured = Sharing._measured

    def counted(work, stage, costs, measure, rounds):
        def noted(mine):
            seen.extend((stage, name) for name in mine)
            yield from measure(mine)

        return measured(work, stage, costs, noted, rounds)

    monkeypatch.setattr(Sharing, "_measured", counted)
    in_processes(2, lambda p: spread(task_of_copy(task), name, p))
    assert len(seen) == len(set(seen)) == len(task.units) * len(task.records)


def test_one_process_goes_on_where_two_were_stopped(tmp_path, monkeypatch):
    task = deep_task()

    def stopped(processes):
        journal = Journal(tmp_path / "c") if processes.rank == 0 else None
        try:
            return spread(task_of_copy(task), "interlayer_hessian", processes, journal)
        finally:
            if journal:
                journal.close()

    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt)
        first, second = in_processes(2, stopped)
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(second, ProcessError)
    assert second.what.startswith("process 1 of 2 lost another one at ")
    table, resumed = shared(tmp_path / "c", task, "interlayer_hessian")
    assert resumed == 3
    assert numbers(table) == numbers(METRICS["interlayer_hessian"](task))


def test_what_hangs_on_a_clock_is_decided_by_the_first_process():
    """The second one has all the time, and would go on with the next call."""
    task = deep_task()

    def run(processes):
        deadline = time.monotonic() - 1 if processes.rank == 0 else float("inf")
        return spread(replace(task_of_copy(task), deadline=deadline), "measured", processes)

    one, other = in_processes(2, run)
    assert one.provenance["records"] == other.provenance["records"] == 1
    assert one.values == other.values


def test_an_error_of_one_process_is_told_to_all():
    def run(processes):
        processes.exchange("first", None)
        if processes.rank == 1:
            error = MpqError("no loss depends on the weights", fix="another loss")
            processes.tell(error)
            raise error
        return processes.exchange("second", None)

    first, second, third = in_processes(3, run)
    for told in (first, third):
        assert isinstance(told, ProcessError)
        assert told.what == (
            "process 1 of 3 failed: no loss depends on the weights\n  fix  another loss"
        )
    assert second.what == "no loss depends on the weights"


def test_only_the_first_process_is_waited_for_with_patience():
    """While it solves, compiles and asks the metric; not while all of them measure."""
    used = []

    def gather(kind: str):
        return lambda value: used.append(kind) or [value, value]

    processes = Processes(1, 2, gather("prompt"), gather("patient"))
    processes.exchange("measured", None)
    processes.rest()
    processes.awaited()
    processes.exchange("measured", None)
    processes.rest()
    processes.tell(MpqError("late"))
    assert used == ["prompt", "patient", "prompt", "patient"]


def test_processes_at_different_places_do_not_take_each_others_numbers():
    found = in_processes(2, lambda p: p.exchange(f"call {p.rank}", p.rank))
    assert [type(each) for each in found] == [ProcessError, ProcessError]
    assert found[0].what == "the processes do not tune the same: they are at call 0, call 1"


def test_processes_of_different_models_end_with_the_difference_on_each():
    def run(processes):
        identity = {"model": {"up.weight": str(processes.rank // 2) * 64}}
        Sharing(processes, None, 0).begin(lambda: identity)

    for found in in_processes(3, run):
        assert isinstance(found, ProcessError)
        assert found.what == "the processes do not tune the same: 2 differs from 0"
        assert found.at == "model: up.weight"
        assert found.fix == "the same model, batches and options in every process"


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 9))
def test_shares_hold_each_unit_once_and_cost_about_the_same(given, size):
    costs = {str(k): cost for k, cost in enumerate(given)}
    parts = shares(costs, size)
    assert len(parts) == size
    assert sorted(name for part in parts for name in part) == sorted(costs)
    assert all(part == sorted(part, key=int) for part in parts), "in the order of the graph"
    loads = [sum(costs[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(given, default=0.0) * (1 + 1e-9)


def test_an_early_unit_costs_more_and_one_without_a_choice_nothing():
    task = deep_task()
    last = task.units[-1][0]
    costs = replace(task, options={**task.options, last: task.options[last][:1]}).costs
    assert [*costs.values()] == [8, 6, 4, 0], "two choices, and how many units are still to come"
