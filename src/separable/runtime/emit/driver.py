"""The driver: runs a list of steps on several threads, and the loop of a worker thread.

A job is posted to the workers and then joined by whoever posted it. All threads walk the same
steps. A step's tasks are dealt out in equal shares, one per thread; who finishes a share takes
tasks from the others, and nobody goes on before all tasks are done. A thread that the system does
not run holds nothing up but the one task it has begun.

    job:    steps, first, last, bases, counters, slots, active, usleep
    step:   kernel, tasks, arguments, (base, offset in bytes) per argument; a base of -n is that of
            the thread, number n + slot
    worker: mailbox, sleeping, slot, reader, writer, read, write, thread, allowed, avoided, getcpu,
            setaffinity

Counters are one cache line each: per step one per share (tasks taken), then one (tasks done).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from ..machine import Machine
from .builder import I32, I64, PTR, Value

JOB = ("steps", "first", "last", "bases", "counters", "slots", "active", "usleep")
WORKER = (
    *("mailbox", "sleeping", "slot", "reader", "writer", "read", "write"),
    *("thread", "allowed", "avoided", "getcpu", "setaffinity"),
)
MASK_WORDS = 16  # of the CPUs that a thread may run on
MOST_ARGUMENTS = 14
STEP_WORDS = 3 + 2 * MOST_ARGUMENTS
LINE_WORDS = 8
STOP = 1  # in a mailbox: leave the loop
_SPINS = 2000  # of a few ten cycles each: about 50 microseconds
_NAP = 50  # microseconds
_VOID = ir.VoidType()


def emit(machine: Machine) -> str:
    """Generate `post`, `join`, `work` and `fetch`."""
    return _Driver(machine).text


class _Driver:
    def __init__(self, machine: Machine) -> None:
        self.module = ir.Module()
        self.machine = machine
        self.pause = ir.Function(
            self.module,
            ir.FunctionType(_VOID, [] if machine.isa != "neon" else [I32]),
            "llvm.x86.sse2.pause" if machine.isa != "neon" else "llvm.aarch64.hint",
        )
        self.share = self._function("share", 2, internal=True)
        self._emit_share()
        self._emit_post()
        self._emit_join()
        self._emit_work()
        self._emit_fetch()
        self.text = str(self.module)

    def _function(self, name: str, parameters: int, internal: bool = False) -> ir.Function:
        function = ir.Function(self.module, ir.FunctionType(_VOID, [I64] * parameters), name)
        if internal:
            function.linkage = "internal"
        self.b = ir.IRBuilder(function.append_basic_block())
        return function

    # -- words in memory ------------------------------------------------------------------------

    def word(self, base: Value, index: Value | int) -> Value:
        """The address of the `index`-th word after `base`."""
        index = I64(index) if isinstance(index, int) else index
        pointer = self.b.inttoptr(base, PTR) if base.type == I64 else base
        return self.b.gep(pointer, [index], source_etype=I64)

    def get(self, base: Value, index: Value | int) -> Value:
        return self.b.load(self.word(base, index), typ=I64)

    def field(self, job: Value, name: str) -> Value:
        return self.get(job, JOB.index(name))

    def atomic(self, operation: str, address: Value, value: Value | int) -> Value:
        value = I64(value) if isinstance(value, int) else value
        return self.b.atomic_rmw(operation, address, value, "seq_cst")

    def look(self, address: Value) -> Value:
        return self.b.load_atomic(address, "acquire", 8, typ=I64)

    def rest(self) -> None:
        """Tell the core that this is a waiting loop."""
        arguments = [I32(1)] if self.machine.isa == "neon" else []
        self.b.call(self.pause, arguments)

    def call(self, address: Value, result: ir.Type, arguments: list[Value]) -> Value:
        """Call the function that lies at an address."""
        type_ = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(self.b.inttoptr(address, type_.as_pointer()), arguments)

    def blocks(self, *names: str) -> list[ir.Block]:
        return [self.b.append_basic_block(name) for name in names]

    def each(self, low: Value, high: Value, body: Callable[[Value], object]) -> None:
        """Emit `body(i)` for `low <= i < high`."""
        b = self.b
        before = b.block
        turn, leave = self.blocks("turn", "leave")
        b.cbranch(b.icmp_signed("<", low, high), turn, leave)
        b.position_at_end(turn)
        i = b.phi(I64)
        i.add_incoming(low, before)
        body(i)
        following = b.add(i, I64(1))
        i.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, high), turn, leave)
        b.position_at_end(leave)

    # -- functions ------------------------------------------------------------------------------

    def _emit_share(self) -> None:
        """One thread's part of a job: `share(job, slot)`."""
        b, (job, slot) = self.b, self.share.args
        steps, bases, counters = (self.field(job, n) for n in ("steps", "bases", "counters"))
        slots, last = self.field(job, "slots"), self.field(job, "last")
        pointers = b.alloca(PTR, MOST_ARGUMENTS)
        entry = b.block
        head, body, leave = self.blocks("step", "resolve", "leave")
        b.branch(head)
        b.position_at_end(head)
        number = b.phi(I64)
        number.add_incoming(self.first(entry, job), entry)
        b.cbranch(b.icmp_signed("<", number, last), body, leave)

        b.position_at_end(body)
        step = self.word(steps, b.mul(number, I64(STEP_WORDS)))
        kernel, tasks, arguments = (self.get(step, i) for i in range(3))
        self._resolve(step, arguments, bases, slot, pointers)

        def run(begin: Value, end: Value) -> None:
            self.call(kernel, _VOID, [pointers, begin, end])

        alone, together, following = self.blocks("alone", "together", "following")
        b.cbranch(b.icmp_signed("==", slots, I64(1)), alone, together)
        b.position_at_end(alone)
        run(I64(0), tasks)
        b.branch(following)

        b.position_at_end(together)
        lines = b.mul(number, b.add(slots, I64(1)))
        shares = self.word(counters, b.mul(lines, I64(LINE_WORDS)))
        done = self.word(shares, b.mul(slots, I64(LINE_WORDS)))
        deal, wait = self.blocks("deal", "wait")
        b.cbranch(b.icmp_signed("<", self.look(done), tasks), deal, following)
        b.position_at_end(deal)
        self._deal(shares, done, tasks, slots, slot, run)
        b.branch(wait)
        b.position_at_end(wait)
        self._wait(done, tasks, self.field(job, "usleep"), following)

        b.position_at_end(following)
        number.add_incoming(b.add(number, I64(1)), b.block)
        b.branch(head)
        b.position_at_end(leave)
        b.ret_void()

    def first(self, entry: ir.Block, job: Value) -> Value:
        with self.b.goto_block(entry):
            return self.field(job, "first")

    def _resolve(
        self, step: Value, count: Value, bases: Value, slot: Value, pointers: Value
    ) -> None:
        """Turn (base, offset) pairs into addresses."""
        b = self.b

        def argument(i: Value) -> None:
            pair = b.add(b.shl(i, I64(1)), I64(3))
            number = self.get(step, pair)
            own = b.icmp_signed("<", number, I64(0))
            base = self.get(bases, b.select(own, b.sub(slot, number), number))
            offset = self.get(step, b.add(pair, I64(1)))
            address = b.gep(b.inttoptr(base, PTR), [offset], source_etype=ir.IntType(8))
            b.store(address, b.gep(pointers, [i], source_etype=PTR))

        self.each(I64(0), count, argument)

    def _deal(
        self, shares: Value, done: Value, tasks: Value, slots: Value, slot: Value, run: object
    ) -> None:
        """Take tasks, first from the own share, then from the others."""
        b = self.b
        before = b.block
        victim, take, work, next_victim, finished = self.blocks(
            "victim", "take", "work", "next", "finished"
        )
        b.branch(victim)
        b.position_at_end(victim)
        k = b.phi(I64)
        k.add_incoming(I64(0), before)
        owner = b.urem(b.add(slot, k), slots)
        low = b.udiv(b.mul(tasks, owner), slots)
        high = b.udiv(b.mul(tasks, b.add(owner, I64(1))), slots)
        counter = self.word(shares, b.mul(owner, I64(LINE_WORDS)))
        b.branch(take)
        b.position_at_end(take)
        task = b.add(low, self.atomic("add", counter, 1))
        b.cbranch(b.icmp_signed("<", task, high), work, next_victim)
        b.position_at_end(work)
        run(task, b.add(task, I64(1)))  # type: ignore[operator]
        self.atomic("add", done, 1)
        b.branch(take)
        b.position_at_end(next_victim)
        following = b.add(k, I64(1))
        k.add_incoming(following, next_victim)
        b.cbranch(b.icmp_signed("<", following, slots), victim, finished)
        b.position_at_end(finished)

    def _wait(self, done: Value, tasks: Value, usleep: Value, leave: ir.Block) -> None:
        """Until all tasks are done: spin shortly, then let other threads have the core.

        Asleep, for a scheduler owes a thread that sleeps the time it did not take, and runs it as
        soon as it wakes. One that yields gives up its turn, time and again.
        """
        b = self.b
        before = b.block
        check, again, nap = self.blocks("check", "again", "nap")
        b.branch(check)
        b.position_at_end(check)
        spins = b.phi(I64)
        spins.add_incoming(I64(0), before)
        b.cbranch(b.icmp_signed("<", self.look(done), tasks), again, leave)
        b.position_at_end(again)
        self.rest()
        more = b.add(spins, I64(1))
        spins.add_incoming(more, again)
        b.cbranch(b.icmp_signed("<", more, I64(_SPINS)), check, nap)
        b.position_at_end(nap)
        self.call(usleep, I32, [I32(_NAP)])
        spins.add_incoming(I64(_SPINS - 16), nap)
        b.branch(check)

    def _emit_post(self) -> None:
        """`post(job, workers, count)`: hand the job to those workers that are idle."""
        post = self._function("post", 3)
        b, (job, workers, count) = self.b, post.args
        token = b.alloca(I64)
        b.store(I64(1), token)
        active = self.word(job, JOB.index("active"))
        self.atomic("xchg", active, 1)
        self._clear(job, count)

        def offer(i: Value) -> None:
            worker = self.get(workers, i)
            mailbox = self.word(worker, WORKER.index("mailbox"))
            taken, wake, refused, next_worker = self.blocks("taken", "wake", "refused", "next")
            # Counted before it is posted: the job stays valid until the last worker has left it.
            self.atomic("add", active, 1)
            swap = b.cmpxchg(mailbox, I64(0), job, "seq_cst", "seq_cst")
            b.cbranch(b.extract_value(swap, 1), taken, refused)
            b.position_at_end(taken)
            slept = self.atomic("xchg", self.word(worker, WORKER.index("sleeping")), 0)
            b.cbranch(b.icmp_signed("==", slept, I64(1)), wake, next_worker)
            b.position_at_end(wake)
            self._keep_apart(worker)
            writer = b.trunc(self.get(worker, WORKER.index("writer")), I32)
            write = self.get(worker, WORKER.index("write"))
            self.call(write, I64, [writer, token, I64(8)])
            b.branch(next_worker)
            b.position_at_end(refused)
            self.atomic("sub", active, 1)
            b.branch(next_worker)
            b.position_at_end(next_worker)

        self.each(I64(0), count, offer)
        b.ret_void()

    def _keep_apart(self, worker: Value) -> None:
        """Forbid a sleeping worker this CPU.

        The system likes to wake a thread where its waker runs; there it would wait for the end of
        the very job it is to share. A worker without a mask of allowed CPUs is left alone.
        """
        b = self.b
        known, changed, done = self.blocks("known", "changed", "done")
        allowed, avoided = (self.get(worker, WORKER.index(n)) for n in ("allowed", "avoided"))
        b.cbranch(b.icmp_signed("!=", allowed, I64(0)), known, done)
        b.position_at_end(known)
        cpu = b.sext(self.call(self.get(worker, WORKER.index("getcpu")), I32, []), I64)
        b.cbranch(b.icmp_signed("!=", cpu, avoided), changed, done)
        b.position_at_end(changed)
        none = b.icmp_signed("<", avoided, I64(0))
        before = b.select(none, I64(0), avoided)
        word = self.word(allowed, b.lshr(before, I64(6)))
        bit = b.select(none, I64(0), b.shl(I64(1), b.and_(before, I64(63))))
        b.store(b.or_(b.load(word, typ=I64), bit), word)
        word, bit = self.word(allowed, b.lshr(cpu, I64(6))), b.shl(I64(1), b.and_(cpu, I64(63)))
        bits = b.load(word, typ=I64)
        b.store(b.and_(bits, b.not_(bit)), word)
        was_allowed = b.icmp_signed("!=", b.and_(bits, bit), I64(0))
        b.store(b.select(was_allowed, cpu, I64(-1)), self.word(worker, WORKER.index("avoided")))
        thread = b.trunc(self.get(worker, WORKER.index("thread")), I32)
        change = self.get(worker, WORKER.index("setaffinity"))
        self.call(change, I32, [thread, I64(8 * MASK_WORDS), allowed])
        b.branch(done)
        b.position_at_end(done)

    def _emit_join(self) -> None:
        """`join(job)`: take part in a job until all of it is done."""
        join = self._function("join", 1)
        (job,) = join.args
        self.b.call(self.share, [job, I64(0)])
        self.atomic("sub", self.word(job, JOB.index("active")), 1)
        self.b.ret_void()

    def _clear(self, job: Value, count: Value) -> None:
        """Set the counters of a job's steps to zero, if workers are to share it."""
        b = self.b
        slots, counters = self.field(job, "slots"), self.field(job, "counters")
        each = b.add(slots, I64(1))
        low, high = (b.mul(self.field(job, name), each) for name in ("first", "last"))
        shared = b.icmp_signed(">", count, I64(0))
        with b.if_then(shared):
            self.each(
                low,
                high,
                lambda i: b.store(I64(0), self.word(counters, b.mul(i, I64(LINE_WORDS)))),
            )

    def _emit_work(self) -> None:
        """`work(worker)`: wait for jobs, spinning shortly and then asleep, until told to stop."""
        work = self._function("work", 1)
        b, (worker,) = self.b, work.args
        mailbox = self.word(worker, WORKER.index("mailbox"))
        sleeping = self.word(worker, WORKER.index("sleeping"))
        slot, read = (self.get(worker, WORKER.index(name)) for name in ("slot", "read"))
        reader = b.trunc(self.get(worker, WORKER.index("reader")), I32)
        token = b.alloca(I64)
        idle, check, again, doze, sleep, found, run, leave = self.blocks(
            "idle", "check", "again", "doze", "sleep", "found", "run", "leave"
        )
        b.branch(idle)
        b.position_at_end(idle)
        b.branch(check)
        b.position_at_end(check)
        spins = b.phi(I64)
        spins.add_incoming(I64(0), idle)
        job = self.look(mailbox)
        b.cbranch(b.icmp_signed("==", job, I64(0)), again, found)
        b.position_at_end(again)
        self.rest()
        more = b.add(spins, I64(1))
        spins.add_incoming(more, again)
        b.cbranch(b.icmp_signed("<", more, I64(_SPINS)), check, doze)
        b.position_at_end(doze)
        # Whoever posts after this exchange sees the flag and writes a token.
        self.atomic("xchg", sleeping, 1)
        b.cbranch(b.icmp_signed("==", self.look(mailbox), I64(0)), sleep, idle)
        b.position_at_end(sleep)
        self.call(read, I64, [reader, token, I64(8)])
        b.branch(idle)
        b.position_at_end(found)
        b.cbranch(b.icmp_signed("==", job, I64(STOP)), leave, run)
        b.position_at_end(run)
        self.atomic("xchg", sleeping, 0)
        b.call(self.share, [job, slot])
        self.atomic("sub", self.word(job, JOB.index("active")), 1)
        self.atomic("xchg", mailbox, 0)
        b.branch(idle)
        b.position_at_end(leave)
        b.ret_void()

    def _emit_fetch(self) -> None:
        """`fetch(lines, count)`: bring memory at these addresses into the cache."""
        fetch = self._function("fetch", 2)
        b, (lines, count) = self.b, fetch.args
        hint = ir.FunctionType(_VOID, [PTR, I32, I32, I32])
        prefetch = ir.Function(self.module, hint, "llvm.prefetch.p0")

        def line(i: Value) -> None:
            address = b.inttoptr(self.get(lines, i), PTR)
            b.call(prefetch, [address, I32(0), I32(3), I32(1)])

        self.each(I64(0), count, line)
        b.ret_void()
