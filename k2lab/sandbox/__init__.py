"""Runs Python that a model wrote, and nothing of the machine but its processor is within that code's reach.

`pick()` gives the sandbox of this machine: bubblewrap (Linux namespaces, a dropped user, a filter on system calls, resource
limits) or, where a container forbids namespaces, a CPython compiled to WebAssembly. There is no third way: without either,
`pick` raises SandboxError and says what to install. A bare subprocess is never used.

    from k2lab import sandbox
    box = sandbox.pick()
    outcome = box.run("print(6 * 7)", sandbox.Limits(seconds=5))
    outcome.ok, outcome.stdout      # True, "42\\n"

Both sandboxes run the program on the standard library alone (no site-packages, no shell), with its string hashes fixed, so
equal programs print equal text. Every call gets a fresh interpreter; nothing survives it. Objects may be shared between
threads, and many calls may run at once; each is one process tree, so callers choose how many that should be.

What is covered, by both: the network and every other host service; the host's files, environment and processes; processor time,
wall time, memory, output, disk; processes left behind. What is NOT covered:

- Errors in the kernel, in bubblewrap or in Wasmtime. Bubblewrap's programs talk to the host's kernel through the system calls
  that the filter leaves open; whoever finds a hole there is out. Code that is hostile on purpose belongs into a virtual
  machine.
- Side channels: caches, branch predictors, memory bandwidth, timing, load. Secrets do not become readable, but they may be
  guessed.
- Facts about the machine: kernel version, processor and its features, number of cores, clock, and (bubblewrap) the system's
  libraries under /usr/lib, read-only.
- A busy machine. A program may keep its processors busy until its time is over, and the limits on wall time then depend on the
  load.
- Memory in all, where no memory cgroup can be made: every process of a program then has its own limit, and several together may
  take `processes` times as much; so may the kernel's own memory for files and pipes. `describe()` says which case this is.
- What the caller does with the output. It is text by an untrusted author.
"""

from __future__ import annotations

from k2lab.core.errors import SandboxError
from k2lab.sandbox.api import Limits, Outcome, Sandbox

__all__ = ["KINDS", "Limits", "Outcome", "Sandbox", "SandboxError", "pick"]

KINDS = ("bubblewrap", "wasm")


def pick(prefer: str = "auto") -> Sandbox:
    """The sandbox to use: `auto` is bubblewrap if it works here, else wasm; a kind by name is that kind or an error.

    A sandbox counts as working once a program has run in it; that is tried once per process and takes a fraction of a second (for
    wasm, several seconds the first time on a machine, since the interpreter is compiled then). Raises SandboxError if there is
    none, saying what to install.
    """
    from k2lab.sandbox import bubblewrap, wasm

    finders = {"bubblewrap": bubblewrap.find, "wasm": wasm.find}
    if prefer not in ("auto", *finders):
        raise SandboxError(f"there is no sandbox called {prefer!r}", allowed=", ".join(("auto", *finders)))
    reasons = []
    for name in finders if prefer == "auto" else (prefer,):
        try:
            return finders[name]()
        except SandboxError as error:
            reasons.append(f"{name}: {error.what}" + (f" ({error.got})" if error.got else ""))
    raise SandboxError(
        f"no sandbox works on this machine, and untrusted code is never run without one: {'; '.join(reasons)}",
        where="sandbox",
        next=_ADVICE[prefer],
    )


_ADVICE = {
    "bubblewrap": "Install it (`apt-get install bubblewrap`) and let this machine make user namespaces, or use wasm",
    "wasm": "Install it with `pip install 'k2lab[wasm]'`",
    "auto": "Install bubblewrap (`apt-get install bubblewrap`), or `pip install 'k2lab[wasm]'`, which needs no privilege",
}
