"""The driver: runs a list of steps on several threads, and the loop of a worker thread.

All threads walk the same steps. A step's tasks are dealt out in equal shares, one per thread;
who finishes a share takes tasks from the others, and nobody goes on before all tasks are done. A
thread that the system does not run holds nothing up but the one task it has begun.

    job:    steps, first, last, bases, counters, slots, active, yield
    step:   kernel, tasks, arguments, (base, offset in bytes) per argument; a base of -n is that of
            the thread, number n + slot
    worker: mailbox, sleeping, slot, reader, writer, read, write

Counters are one cache line each: per step one per share (tasks taken), then one (tasks done).
"""

from __future__ import annotations

from llvmlite import ir

from ..machine import Machine
from .builder import I32, I64, PTR, Value

JOB = ("steps", "first", "last", "bases", "counters", "slots", "active", "yield")
WORKER = ("mailbox", "sleeping", "slot", "reader", "writer", "read", "write")
MOST_ARGUMENTS = 14
STEP_WORDS = 3 + 2 * MOST_ARGUMENTS
LINE_WORDS = 8
STOP = 1  # in a mailbox: leave the loop
_SPINS = 2000  # of a few ten cycles each: about 50 microseconds
_VOID = ir.VoidType()


def emit(machine: Machine) -> str:
    """Generate `launch(job, workers, count)` and `work(worker)`."""
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
        self._emit_launch()
        self._emit_work()
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
        self._wait(done, tasks, self.field(job, "yield"), following)

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
        before = b.block
        turn, ready = self.blocks("argument", "ready")
        b.branch(turn)
        b.position_at_end(turn)
        i = b.phi(I64)
        i.add_incoming(I64(0), before)
        pair = b.add(b.shl(i, I64(1)), I64(3))
        number = self.get(step, pair)
        own = b.icmp_signed("<", number, I64(0))
        base = self.get(bases, b.select(own, b.sub(slot, number), number))
        offset = self.get(step, b.add(pair, I64(1)))
        address = b.gep(b.inttoptr(base, PTR), [offset], source_etype=ir.IntType(8))
        b.store(address, b.gep(pointers, [i], source_etype=PTR))
        following = b.add(i, I64(1))
        i.add_incoming(following, turn)
        b.cbranch(b.icmp_signed("<", following, count), turn, ready)
        b.position_at_end(ready)

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

    def _wait(self, done: Value, tasks: Value, yield_: Value, leave: ir.Block) -> None:
        """Until all tasks are done: spin shortly, then let other threads have the core."""
        b = self.b
        before = b.block
        check, again, give_way = self.blocks("check", "again", "give_way")
        b.branch(check)
        b.position_at_end(check)
        spins = b.phi(I64)
        spins.add_incoming(I64(0), before)
        b.cbranch(b.icmp_signed("<", self.look(done), tasks), again, leave)
        b.position_at_end(again)
        self.rest()
        more = b.add(spins, I64(1))
        spins.add_incoming(more, again)
        b.cbranch(b.icmp_signed("<", more, I64(_SPINS)), check, give_way)
        b.position_at_end(give_way)
        self.call(yield_, I32, [])
        spins.add_incoming(I64(_SPINS - 16), give_way)
        b.branch(check)

    def _emit_launch(self) -> None:
        """`launch(job, workers, count)`: hand the job to idle workers and take part."""
        launch = self._function("launch", 3)
        b, (job, workers, count) = self.b, launch.args
        entry = b.block
        token = b.alloca(I64)
        b.store(I64(1), token)
        active = self.word(job, JOB.index("active"))
        offer, post, wake, refused, next_worker, start = self.blocks(
            "offer", "post", "wake", "refused", "next", "start"
        )
        b.cbranch(b.icmp_signed(">", count, I64(0)), offer, start)
        b.position_at_end(offer)
        i = b.phi(I64)
        i.add_incoming(I64(0), entry)
        worker = self.get(workers, i)
        mailbox = self.word(worker, WORKER.index("mailbox"))
        # Counted before it is posted: the job stays valid until the last worker has left it.
        self.atomic("add", active, 1)
        taken = b.extract_value(b.cmpxchg(mailbox, I64(0), job, "seq_cst", "seq_cst"), 1)
        b.cbranch(taken, post, refused)
        b.position_at_end(post)
        slept = self.atomic("xchg", self.word(worker, WORKER.index("sleeping")), 0)
        b.cbranch(b.icmp_signed("==", slept, I64(1)), wake, next_worker)
        b.position_at_end(wake)
        writer = b.trunc(self.get(worker, WORKER.index("writer")), I32)
        write = self.get(worker, WORKER.index("write"))
        self.call(write, I64, [writer, token, I64(8)])
        b.branch(next_worker)
        b.position_at_end(refused)
        self.atomic("sub", active, 1)
        b.branch(next_worker)
        b.position_at_end(next_worker)
        following = b.add(i, I64(1))
        i.add_incoming(following, next_worker)
        b.cbranch(b.icmp_signed("<", following, count), offer, start)
        b.position_at_end(start)
        b.call(self.share, [job, I64(0)])
        self.atomic("sub", active, 1)
        b.ret_void()

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
