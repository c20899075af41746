"""What one request may ask for at most."""

from dataclasses import dataclass

from bonsai_lora.core.registry import adapter_bytes
from bonsai_lora.core.shapes import Shapes
from bonsai_lora.errors import (
    AnswerTooLargeError,
    BodyTooLargeError,
    MemoryBudgetError,
    RankTooLargeError,
    TooManyRowsError,
)
from bonsai_lora.storage.store import SetStore


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds from the settings; sizes in bytes."""

    max_body_bytes: int
    max_json_bytes: int
    max_upload_bytes: int
    max_header_bytes: int
    max_rows: int
    max_rank: int
    max_answer_bytes: int
    memory_budget_bytes: int

    def check_rows(self, rows: int) -> None:
        """Raise TooManyRowsError over max_rows."""
        if rows > self.max_rows:
            raise TooManyRowsError(
                f"the batch has {rows} rows; at most {self.max_rows} are taken at once, split it",
                got=rows,
                limit=self.max_rows,
            )

    def check_answer(self, values: int) -> None:
        """Raise AnswerTooLargeError where `values` float32 numbers exceed max_answer_bytes."""
        if 4 * values > self.max_answer_bytes:
            raise AnswerTooLargeError(
                f"the answer would hold {4 * values} bytes of float32; at most "
                f"{self.max_answer_bytes} are given at once, ask for fewer rows or modules",
                got_bytes=4 * values,
                limit_bytes=self.max_answer_bytes,
            )

    def check_region_bytes(self, size: int) -> None:
        """Raise BodyTooLargeError where inputs in shared memory exceed what a body may hold."""
        if size > self.max_body_bytes:
            raise BodyTooLargeError(
                f"the inputs have {size} bytes in shared memory; at most {self.max_body_bytes} are "
                "taken at once",
                got_bytes=size,
                limit_bytes=self.max_body_bytes,
            )

    def check_rank(self, rank: int) -> None:
        """Raise RankTooLargeError over max_rank."""
        if rank > self.max_rank:
            raise RankTooLargeError(
                f"the rank is {rank}; at most {self.max_rank} is taken",
                got=rank,
                limit=self.max_rank,
            )

    def check_budget(self, store: SetStore, name: str, new_bytes: int) -> None:
        """Raise MemoryBudgetError where all sets, with `name` at `new_bytes`, exceed the budget.

        Sets that a newer release wrote count with the size of their files.
        """
        held = sum(one.total_memory_bytes for one in store.records() if one.name != name)
        held += sum(store.newer_files().values())
        if held + new_bytes > self.memory_budget_bytes:
            raise MemoryBudgetError(
                f"set {name!r} needs {new_bytes} bytes, the other sets hold {held}, and the "
                f"budget is {self.memory_budget_bytes}; delete sets or raise "
                "memory_budget_bytes",
                needed_bytes=new_bytes,
                held_bytes=held,
                budget_bytes=self.memory_budget_bytes,
            )


def shapes_bytes(shapes: Shapes, rank: int) -> int:
    """Return the float32 size in bytes of adapters of these shapes."""
    return sum(adapter_bytes(d_in, d_out, rank) for d_in, d_out in shapes.values())
