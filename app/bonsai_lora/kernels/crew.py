"""Threads that share a job out: one posts it and all do a part of it, where they look for it.

A job is a function that is called as part(..., part, parts, half_done), with JOB_WORDS numbers or
pointers before; `half_done` is a count that the parts may use to wait for each other.
"""

from llvmlite import ir

from bonsai_lora.kernels.code import FLOAT, I64, POINTER, Code, Value

# Of the memory that the threads share: each on cache lines of its own.
_TICKET, _DONE, _HALF_DONE, _SLEEPERS, _JOB = range(0, 5 * 128, 128)
SHARED_BYTES = 6 * 128
JOB_WORDS = 9
_LOOKS = 1000
"""Before a thread that waits gives way to others: 10 µs or so."""


def write_share(code: Code) -> None:
    """Write share(shared, parts, function, ...): the first part, while others do theirs.

    Where some of them sleep, nothing is done yet: it returns them, as a sum of powers of two.
    They are to be woken, and `finish` to be called.
    """
    shared, parts, *job = code.arguments
    for number, value in enumerate(job):
        code.store(value, code.at(shared, code.const(_JOB + 8 * number)))
    for place in (_DONE, _HALF_DONE):
        code.store(code.const(0), code.at(shared, code.const(place)))
    code.atomic("add", code.at(shared, code.const(_TICKET)), code.const(1))
    sleepers = code.atomic("xchg", code.at(shared, code.const(_SLEEPERS)), code.const(0))
    awake = code.builder.icmp_signed("==", sleepers, code.const(0))
    with code.builder.if_then(awake):
        code.end(code.call("finish", [shared, parts]))
    code.end(code.builder.sitofp(sleepers, FLOAT))


def write_finish(code: Code) -> None:
    """Write finish(shared, parts): the first part of what was shared out, until all is done."""
    shared, parts = code.arguments
    result = _do_part(code, shared, code.const(0), parts)
    others = code.builder.sub(parts, code.const(1))
    wait_for(code, code.at(shared, code.const(_DONE)), others)
    code.end(result)


def write_serve(code: Code) -> None:
    """Write serve(shared, part, parts, seen, patience): one thread's part of all that is shared.

    `seen` is the last ticket that it knows. When there was none for so many looks it counts itself
    to the sleepers and returns the last; it is to come back when it is woken.
    """
    shared, part, parts, first_seen, patience = code.arguments
    builder, one = code.builder, code.const(1)
    ticket = code.at(shared, code.const(_TICKET))
    sleepers = code.at(shared, code.const(_SLEEPERS))
    seen, left = builder.alloca(I64), builder.alloca(I64)
    builder.store(first_seen, seen)
    builder.store(patience, left)
    with code.forever():
        now = code.atomic_load(ticket)
        known = builder.load(seen, typ=I64)
        with builder.if_else(builder.icmp_signed("!=", now, known)) as (is_new, is_old):
            with is_new:
                _do_part(code, shared, part, parts)
                code.atomic("add", code.at(shared, code.const(_DONE)), one)
                builder.store(now, seen)
                builder.store(patience, left)
            with is_old:
                code.pause()
                less = builder.sub(builder.load(left, typ=I64), one)
                builder.store(less, left)
                left_over = builder.srem(less, code.const(_LOOKS))
                with builder.if_then(builder.icmp_signed("==", left_over, code.const(0))):
                    code.let_others_run()
                with builder.if_then(builder.icmp_signed("<", less, code.const(0))):
                    bit = builder.shl(one, part)
                    code.atomic("or", sleepers, bit)
                    # Who shares out changes the ticket and then looks who sleeps; here it is the
                    # other way round, so one of the two sees the other.
                    late = builder.icmp_signed(
                        "!=", code.atomic("add", ticket, code.const(0)), known
                    )
                    with builder.if_then(late):
                        others = code.atomic("and", sleepers, builder.not_(bit))
                        unseen = builder.icmp_signed("!=", builder.and_(others, bit), code.const(0))
                        with builder.if_then(unseen):
                            builder.store(patience, left)
                    asleep = builder.icmp_signed("<", builder.load(left, typ=I64), code.const(0))
                    with builder.if_then(asleep):
                        code.end(known)
    builder.unreachable()


def wait_for(code: Code, pointer: Value, count: Value) -> None:
    """Wait until the count there is reached, soon: others are at work on it."""
    builder, none = code.builder, code.const(0)
    look, wait, give_way, end = (builder.append_basic_block() for _ in range(4))
    before = builder.block
    builder.branch(look)
    builder.position_at_end(look)
    looks = builder.phi(I64)
    looks.add_incoming(none, before)
    builder.cbranch(builder.icmp_signed(">=", code.atomic_load(pointer), count), end, wait)
    builder.position_at_end(wait)
    code.pause()
    more = code.add(looks, code.const(1))
    looks.add_incoming(more, wait)
    builder.cbranch(builder.icmp_signed("<", more, code.const(_LOOKS)), look, give_way)
    builder.position_at_end(give_way)
    # Where there are more threads than cores, the one that is waited for may want this core.
    code.let_others_run()
    looks.add_incoming(none, give_way)
    builder.branch(look)
    builder.position_at_end(end)


def _do_part(code: Code, shared: Value, part: Value, parts: Value) -> Value:
    """Do a part of the job that was posted."""
    kind = ir.FunctionType(FLOAT, [*[I64] * JOB_WORDS, I64, I64, POINTER])
    function, *job = (
        code.load(code.at(shared, code.const(_JOB + 8 * word)), I64 if word else kind.as_pointer())
        for word in range(1 + JOB_WORDS)
    )
    half_done = code.at(shared, code.const(_HALF_DONE))
    return code.builder.call(function, [*job, part, parts, half_done])
