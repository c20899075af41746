"""Bytes that requests hold: counted once, and released as they were counted."""

import pytest

from bonsai_lora.errors import BusyError, MemoryBudgetError
from bonsai_lora.service.budget import Budget, Reservation


def test_what_does_not_fit_now_is_not_counted():
    budget = Budget(10)
    with Reservation(budget) as others:
        others.add(6)
        with Reservation(budget) as own:
            assert own.try_add(4)
            assert not own.try_add(1)
            with pytest.raises(BusyError) as caught:
                own.add(1)
            assert budget.reserved_bytes == 10
        assert caught.value.values == {
            "needed_bytes": 1,
            "reserved_bytes": 10,
            "budget_bytes": 10,
        }
        assert budget.reserved_bytes == 6
    assert budget.reserved_bytes == 0


def test_what_never_fits_is_refused_for_good():
    budget = Budget(10)
    with Reservation(budget) as own:
        own.add(10)
        with pytest.raises(MemoryBudgetError) as caught:
            own.add(11)
        assert caught.value.values == {"needed_bytes": 11, "budget_bytes": 10}
        assert budget.reserved_bytes == 10
    assert budget.reserved_bytes == 0
