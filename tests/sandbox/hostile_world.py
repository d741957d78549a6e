"""A world around a sandbox that hostile programs must not reach, and the judge of what they did.

As a script (standard library only) this runs all programs in one sandbox, so that other users can do so, too:

    python tests/sandbox/hostile_world.py bubblewrap
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import hostile_force
import hostile_reach
from hostile_attack import ESCAPED, PRELUDE, Attack

ATTACKS = hostile_reach.ATTACKS + hostile_force.ATTACKS
REPOSITORY = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- the world outside


@dataclass
class World:
    """What lies around the sandbox: services, files, a variable, a descriptor, and a process that must stay alive."""

    words: dict[str, str]
    victim: subprocess.Popen

    def program(self, attack: Attack) -> str:
        """The attack's program, with the addresses of this world in it."""
        code = PRELUDE + textwrap.dedent(attack.code)
        for word, value in self.words.items():
            code = code.replace(f"@{word}@", value)
        return code


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Services on loopback and UNIX sockets that tell a secret to whoever comes, and more places that hold it."""
    secret = f"secret{os.urandom(6).hex()}"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-"))
        os.chmod(folder, 0o755)
        Path(folder, "secret").write_text(secret)
        abstract = f"hostile-{secret}"
        servers = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
        for server, address in zip(servers, (f"{folder}/socket", "\0" + abstract, ("127.0.0.1", 0))):
            stack.enter_context(server)
            server.bind(address)
            server.listen()
            threading.Thread(target=_tell, args=(server, secret.encode()), daemon=True).start()
        os.chmod(f"{folder}/socket", 0o777)
        port = servers[-1].getsockname()[1]
        opened = os.open(f"{folder}/secret", os.O_RDONLY)
        stack.callback(os.close, opened)
        os.set_inheritable(opened, True)
        os.environ["K2_TEST_SECRET"] = secret
        stack.callback(os.environ.pop, "K2_TEST_SECRET")
        victim = subprocess.Popen(["/bin/sleep", "600"])
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        words = {
            "SECRET": secret,
            "FOLDER": folder,
            "PORT": str(port),
            "ABSTRACT": abstract,
            "REPOSITORY": str(REPOSITORY),
            "PARENT": str(os.getpid()),
            "VICTIM": str(victim.pid),
            "NONCE": f"h{secret[-12:]}",
        }
        yield World(words, victim)


def _tell(server: socket.socket, secret: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(secret)


# ---------------------------------------------------------------- judging


def problems(box, attack: Attack, around: World) -> list[str]:  # type: ignore[no-untyped-def]
    """What went wrong when `attack` was run in `box`; empty if it was contained and everything outside is healthy."""
    from k2lab.sandbox import Limits

    limits = Limits(
        seconds=attack.seconds, memory_mb=128, output_bytes=100_000, files_mb=attack.files_mb, processes=attack.processes
    )
    began = time.monotonic()
    outcome = box.run(around.program(attack), limits)
    took = time.monotonic() - began
    found = []
    said = outcome.stdout + outcome.stderr
    if ESCAPED in said or around.words["SECRET"] in said:
        found.append(f"it escaped: {said[-500:]}")
    if outcome.stop not in attack.stops:
        found.append(f"it ended with {outcome.stop} {outcome.exit_code}: {said[-500:]}")
    if len(said.encode("utf-8", "replace")) > 3 * limits.output_bytes:
        found.append(f"{len(said)} characters of output came through")
    if outcome.seconds > limits.seconds + 2:
        found.append(f"it ran for {outcome.seconds:.1f} s; the call took {took:.1f} s")
    if around.victim.poll() is not None:
        found.append("a process of the host is dead")
    if left := survivors(around.words["NONCE"]):
        found.append(f"processes are left: {left}")
    for path in ("/usr/lib", "/usr/bin", "/lib64", "/", "/dev", "/usr", "/tmp"):
        if os.path.lexists(f"{path}/{around.words['NONCE']}"):
            found.append(f"a file was left in {path}")
    return found


def all_problems(box, around: World, workers: int = 3) -> dict[str, list[str]]:  # type: ignore[no-untyped-def]
    """The problems of every attack that is about `box`, by name. Several run at once, beside programs that must not notice."""
    from k2lab.sandbox import Limits

    attacks = [attack for attack in ATTACKS if attack.only in ("", box.name)]
    over = threading.Event()
    neighbours: list[str] = []

    def neighbour() -> None:
        while not over.is_set():
            try:
                outcome = box.run("print(sum(range(1000)))", Limits(seconds=20))
            except Exception as error:
                neighbours.append(repr(error))
            else:
                neighbours.extend([str(outcome)] if outcome.stdout != "499500\n" else [])
            over.wait(0.2)

    watching = threading.Thread(target=neighbour)
    watching.start()
    try:
        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip([attack.name for attack in attacks], pool.map(lambda a: problems(box, a, around), attacks)))
    finally:
        over.set()
        watching.join()
    found["neighbours"] = neighbours
    return found


def survivors(name: str) -> list[str]:
    """Processes of the machine that call themselves `name`, a second after they should be gone."""
    for _ in range(20):
        found = []
        for path in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if path.read_text().strip() == name:
                    found.append(str(path))
        if not found:
            return []
        time.sleep(0.05)
    return found


def unprotected(attack: Attack, around: World) -> str:
    """What the attack prints without any sandbox; only for harmless ones."""
    assert attack.bare
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", around.program(attack)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=folder,
            close_fds=False,
            timeout=30,
            preexec_fn=lambda: signal.alarm(20),
        )
    return done.stdout


def main() -> int:
    """Runs every attack in the sandbox that is named, and prints what was not contained."""
    sys.path.insert(0, str(REPOSITORY))
    from k2lab.sandbox import pick

    box = pick(sys.argv[1])
    print(f"user {os.geteuid()}: {box.describe()}")
    with world() as around:
        found = all_problems(box, around)
    for name, rows in found.items():
        for row in rows:
            print(f"{name}: {row}")
    bad = sum(map(bool, found.values()))
    print(f"{len(found) - 1} attacks, {bad} not contained")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
