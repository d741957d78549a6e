"""The first lines that run inside a sandbox, and how the host understands what came of them.

`PROGRAM` is handed to the interpreter inside. It lowers its own limits for good, takes the model's code from stdin (so that it
is on no disk and in no process list), says READY, and runs it. It shares no trust with what it runs: once the code has begun,
nothing that comes out of the sandbox is believed beyond being the code's output.
"""

from __future__ import annotations

from k2lab.sandbox.api import Limits

# The one byte on stdout that says: limits are set and the program begins. If nobody can hear it any more, it does not begin.
READY = b"\x06"
FILENAME = "<code>"
# The system calls that set limits do not exist in WebAssembly.
NO_LIMITS = "-"

PROGRAM = r"""
def _boot():
    import os, sys
    limits, echo = sys.argv[1], sys.argv[2] == "echo"
    if limits != "-":
        import resource
        for pair in limits.split(","):
            name, value = pair.split("=")
            which = getattr(resource, "RLIMIT_" + name)
            hard = resource.getrlimit(which)[1]
            value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
            resource.setrlimit(which, (value, value))
    import builtins
    name = "<code>"
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    scope = sys.modules["__main__"].__dict__
    scope.pop("_boot")
    builtins.exit = builtins.quit = sys.exit
    sys.argv[:] = [name]
    sys.stdout.reconfigure(line_buffering=True)
    os.write(1, b"\x06")
    try:
        tree = compile(source, name, "exec", 0x400, True)
        last = None
        if echo and tree.body and type(tree.body[-1]).__name__ == "Expr":
            import _ast
            last = _ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec", 0, True), scope)
        if last is not None:
            value = eval(compile(last, name, "eval", 0, True), scope)
            if value is not None:
                print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        try:
            sys.stdout.flush()
            trace = error.__traceback__ and error.__traceback__.tb_next
            sys.__excepthook__(type(error), error.with_traceback(trace), trace)
        except BaseException:
            os.write(2, (type(error).__name__ + "\n").encode())
        sys.exit(1)
_boot()
"""


def arguments(limits: Limits | None, echo: bool) -> list[str]:
    """Arguments of the interpreter: fixed behaviour, the first program, and its two arguments. No limits: `limits` None."""
    told = NO_LIMITS
    if limits is not None:
        values = {
            "CORE": 0,
            "AS": limits.memory_mb << 20,
            # Only a backstop for a host that has died: the host itself ends the program by the clock.
            "CPU": int(limits.seconds) + 2,
            "FSIZE": limits.files_mb << 20,
            "NOFILE": 64,
            "NPROC": limits.processes,
        }
        told = ",".join(f"{name}={value}" for name, value in values.items())
    return ["-s", "-S", "-B", "-X", "utf8", "-c", PROGRAM, told, "echo" if echo else "plain"]


def out_of_memory(stderr: str) -> bool:
    """Whether a program that failed says that it had too little memory."""
    lines = stderr.rstrip().rsplit("\n", 1)
    return lines[-1].startswith("MemoryError")
