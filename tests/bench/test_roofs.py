"""Roofs: what is counted is what the formulas say, the best way wins, and torch's threads are left as they were."""

import math

import pytest
import torch

from bench import roofs
from bench.roofs import best, matrix_product, memory_read, num_threads


def test_quick_roofs_are_four_positive_rates() -> None:
    threads = torch.get_num_threads()
    figures = roofs.roofs(quick=True)
    assert [(figure.name, figure.unit) for figure in figures] == [
        ("memory read, 1 thread", "GB/s"),
        ("memory read, all threads", "GB/s"),
        ("matrix product, fp32", "GFLOP/s"),
        ("matrix product, bf16", "GFLOP/s"),
    ]
    for figure in figures:
        assert figure.low is not None
        assert 0 < figure.low <= figure.value < math.inf
        assert figure.high == figure.value
    assert torch.get_num_threads() == threads


def test_rates_count_every_byte_and_operation_of_the_measured_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "repeat", lambda run: [0.25, 0.5] if run() is not None else [])
    read = memory_read("read", torch.ones(1000))  # 4000 bytes
    assert (read.value, read.low) == (4000 / 0.25 / 1e9, 4000 / 0.5 / 1e9)
    product = matrix_product("product", (10, 20), torch.float32)  # a row times a column: 20 products and 20 sums
    assert product.value == pytest.approx(20 * 20 * (20 + 20) / 0.25 / 1e9)


def test_the_first_call_is_not_counted() -> None:
    calls: list[int] = []

    def run() -> torch.Tensor:
        calls.append(len(calls))
        return torch.zeros(())

    assert len(roofs.repeat(run)) == roofs.REPETITIONS == len(calls) - 1


def test_best_is_the_best_repetition_of_the_best_way() -> None:
    figure = best("x", "GB/s", [[5.0, 6.0], [4.0, 9.0, 7.0], [8.0, 8.0]])
    assert (figure.value, figure.low, figure.high) == (9.0, 4.0, 9.0)


def test_threads_come_back_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), num_threads(1):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("read", roofs.READERS)
def test_readers_depend_on_every_value(read: roofs.Reader) -> None:
    """A reader that skipped values would look faster than memory is."""
    values = torch.ones(1000)
    before = read(values)
    for i in (0, 499, 999):
        changed = values.clone()
        changed[i] = 2.0
        assert not torch.equal(read(changed), before)
