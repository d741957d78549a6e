"""The process in which a WebAssembly interpreter runs: started by `wasm`, one per program, as a script that knows only its
arguments.

    _wasm_worker.py PACKAGES HOST_PID compile WASM OUT
    _wasm_worker.py PACKAGES HOST_PID run COMPILED MEMORY_BYTES FUEL CPU_SECONDS ARGUMENT...

The guest gets the worker's stdin, stdout and stderr, an environment of one variable, and nothing else: no folder, no clock but
the time, no socket. A guest that has used up its fuel ends the worker by SIGXCPU, a guest that traps by SIGABRT; so the host
can tell both from any exit code that a guest may choose.
"""

from __future__ import annotations

import os
import resource
import signal
import sys


def _config():  # the same for compiling and running: a compiled file fits one configuration only
    import wasmtime

    config = wasmtime.Config()
    config.consume_fuel = True
    # Results that do not depend on the processor.
    config.cranelift_nan_canonicalization = True
    return config


def _compile(source: str, target: str) -> None:
    import wasmtime

    with open(source, "rb") as file:
        module = wasmtime.Module(wasmtime.Engine(_config()), file.read())
    with open(target, "wb") as file:
        file.write(module.serialize())
        file.flush()
        os.fsync(file.fileno())


def _limit(cpu_seconds: int) -> None:
    """What the guest's own limits do not cover, should it ever get out."""
    values = {"CORE": 0, "CPU": cpu_seconds, "FSIZE": 0, "NOFILE": 32}
    for name, value in values.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _die_with(host: int) -> None:
    """On Linux the kernel ends this process if the one that started it is gone; it may be gone already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != host:
        _end_by(signal.SIGKILL)


def _run(compiled: str, memory: int, fuel: int, arguments: list[str]) -> int:
    import wasmtime

    engine = wasmtime.Engine(_config())
    # The file is trusted: `wasm` has made sure that only this user can have written it.
    module = wasmtime.Module.deserialize_file(engine, compiled)
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", *arguments]
    wasi.env = [("PYTHONHASHSEED", "0")]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=memory, instances=1, memories=1)
    store.set_fuel(fuel)
    store.set_wasi(wasi)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    start = linker.instantiate(store, module).exports(store)["_start"]
    try:
        start(store)  # type: ignore[operator]
    except wasmtime.ExitTrap as exit:
        return exit.code
    except wasmtime.Trap as trap:
        if trap.trap_code == wasmtime.TrapCode.OUT_OF_FUEL:
            _end_by(signal.SIGXCPU)
        os.write(2, f"\n{trap.message.splitlines()[0] if trap.message else 'trap'}\n".encode())
        _end_by(signal.SIGABRT)
    return 0


def _end_by(number: signal.Signals) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main() -> int:
    packages, host, task, *rest = sys.argv[1:]
    sys.path.append(packages)
    _die_with(int(host))
    if task == "compile":
        _compile(*rest)
        return 0
    compiled, memory, fuel, cpu_seconds, *arguments = rest
    _limit(int(cpu_seconds))
    return _run(compiled, int(memory), int(fuel), arguments)


if __name__ == "__main__":
    try:
        code = main()
    except BaseException as error:  # no exit code of the guest's may be mistaken for it
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
        _end_by(signal.SIGABRT)
    else:
        os._exit(code)
