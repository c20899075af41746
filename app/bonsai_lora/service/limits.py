"""Limits on requests."""

from dataclasses import dataclass

from bonsai_lora.errors import (
    AnswerTooLargeError,
    BodyTooLargeError,
    RankTooLargeError,
    TooManyModulesError,
    TooManyRowsError,
    counted,
)

_TENSORS_PER_MODULE = 8
"""A and B, bias and magnitude, those of an embedding, and some of a replaced module."""

FIGURE_BYTES = 96
"""Most memory that a float64 takes on its way into JSON: as an object, in lists, and as text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits from the settings; sizes are in bytes."""

    max_body_bytes: int
    max_json_bytes: int
    max_upload_bytes: int
    max_header_bytes: int
    max_rows: int
    max_rank: int
    max_modules: int
    max_answer_bytes: int
    memory_budget_bytes: int

    def check_rows(self, rows: int) -> None:
        """Raise TooManyRowsError if `rows` is over max_rows."""
        if rows > self.max_rows:
            raise TooManyRowsError(
                f"the batch has {rows} rows, but the limit is {self.max_rows}; split the batch",
                got=rows,
                limit=self.max_rows,
            )

    def check_answer(self, values: int) -> None:
        """Raise AnswerTooLargeError if `values` float32 numbers exceed max_answer_bytes."""
        if 4 * values > self.max_answer_bytes:
            raise AnswerTooLargeError(
                f"the response would have {4 * values} bytes of float32, but the limit is "
                f"{self.max_answer_bytes}; request fewer rows or modules at once",
                got_bytes=4 * values,
                limit_bytes=self.max_answer_bytes,
            )

    def check_region_bytes(self, size: int) -> None:
        """Raise BodyTooLargeError if inputs in shared memory exceed max_body_bytes."""
        if size > self.max_body_bytes:
            raise BodyTooLargeError(
                f"the inputs have {size} bytes in shared memory, but the limit is "
                f"{self.max_body_bytes}; send fewer rows at once",
                got_bytes=size,
                limit_bytes=self.max_body_bytes,
            )

    def check_rank(self, rank: int) -> None:
        """Raise RankTooLargeError if `rank` is over max_rank."""
        if rank > self.max_rank:
            raise RankTooLargeError(
                f"the rank is {rank}, but the limit is {self.max_rank}; lower the rank, or raise "
                "max_rank",
                got=rank,
                limit=self.max_rank,
            )

    def check_modules(self, count: int) -> None:
        """Raise TooManyModulesError if a set would have more than max_modules."""
        if count > self.max_modules:
            raise TooManyModulesError(
                f"the set has {counted(count, 'module')}, but the limit is {self.max_modules}; "
                "split it, or raise max_modules",
                got=count,
                limit=self.max_modules,
            )

    def check_tensors(self, count: int) -> None:
        """Raise TooManyModulesError if a file has more tensors than max_modules modules have."""
        most = _TENSORS_PER_MODULE * self.max_modules
        if count > most:
            raise TooManyModulesError(
                f"the file has {counted(count, 'tensor')}, but {self.max_modules} modules, which "
                f"is the limit, have at most {most}; split it, or raise max_modules",
                got=count,
                limit=most,
            )
