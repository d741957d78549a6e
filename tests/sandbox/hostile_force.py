"""Programs that take more than their share, and programs that turn against other processes."""

from __future__ import annotations

from hostile_attack import ANY, SPIN, Attack

ATTACKS = [
    # ---- resources
    Attack(
        "fork bomb",
        """
        n = 0
        while True:
            try:
                os.fork()
            except OSError:
                n += 1
                if n > 1000: os._exit(0)
        """,
        ANY,
        only="bubblewrap",
        seconds=2,
    ),
    Attack(
        "counting forks",
        """
        import time
        n = 0
        try:
            while n < 200:
                if os.fork() == 0: time.sleep(60)
                n += 1
        except OSError: pass
        print('ESC' + 'APED' if n >= 8 else 'few', n)
        os._exit(0)
        """,
        only="bubblewrap",
    ),
    Attack(
        "threads",
        """
        import threading, time
        n = 0
        try:
            while n < 200:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                n += 1
        except RuntimeError: pass
        print('ESC' + 'APED' if n >= 8 else 'few', n)
        os._exit(0)
        """,
    ),
    Attack(
        "memory",
        """
        x = []
        while True: x.append(bytearray(1 << 22))
        """,
        ("memory",),
    ),
    Attack(
        "memory at once",
        "x = bytearray(1 << 30)",
        ("memory",),
    ),
    Attack(
        "memory of many processes",
        """
        import time, mmap
        for n in range(6):
            if os.fork() == 0:
                m = mmap.mmap(-1, 80 << 20)
                for i in range(0, 80 << 20, 4096): m[i] = 1
                os.write(1, b'full ')
                time.sleep(60)
        time.sleep(60)
        """,
        ("timeout", "memory"),
        only="bubblewrap",
        seconds=1.5,
    ),
    Attack(
        "memory that nobody counts",
        """
        import ctypes
        attempt(lambda: os.memfd_create('x'), 'memfd')
        l = libc()
        attempt(lambda: l.shmget(0, 1 << 30, 0o1600) >= 0, 'shm')
        attempt(lambda: l.msgget(0, 0o1600) >= 0, 'msg')
        attempt(lambda: l.semget(0, 30000, 0o1600) >= 0, 'sem')
        """,
        bare=True,
        only="bubblewrap",
    ),
    Attack(
        "processor",
        "while True: pass",
        SPIN,
        seconds=0.5,
    ),
    Attack(
        "processor in C",
        "x = 7 ** (10 ** 9)",
        ("timeout", "memory"),
        seconds=0.5,
    ),
    Attack(
        "sleep",
        """
        import time
        time.sleep(10 ** 6)
        """,
        SPIN,
        seconds=0.5,
    ),
    Attack(
        "sleep without output",
        """
        import time
        os.close(1); os.close(2)
        time.sleep(10 ** 6)
        """,
        SPIN,
        seconds=0.5,
    ),
    Attack(
        "waiting for input",
        "attempt(lambda: sys.stdin.read())",
    ),
    Attack(
        "disk",
        """
        n = 0
        try:
            for k in range(100):
                with open(f'/tmp/{k}', 'wb', 0) as f:
                    for i in range(100): n += f.write(bytes(1 << 20))
        except OSError as e: print(e)
        print('ESC' + 'APED' if n > 4 << 20 else 'little', n)
        """,
    ),
    Attack(
        "a large sparse file",
        """
        def f():
            with open('/tmp/x', 'wb') as x: x.truncate(1 << 40)
            return True
        attempt(f)
        """,
    ),
    Attack(
        "many small files",
        """
        n = 0
        try:
            while True:
                open(f'/tmp/{n}', 'w').close(); n += 1
        except OSError: pass
        """,
        ("exit", "timeout", "memory"),
        seconds=1,
    ),
    Attack(
        "deep folders",
        """
        try:
            while True: os.mkdir('d'); os.chdir('d')
        except OSError: pass
        """,
        ("exit", "timeout", "memory"),
        seconds=1,
    ),
    Attack(
        "flood of stdout",
        "while True: print('x' * 1000)",
        ("output",),
    ),
    Attack(
        "flood of stderr",
        "while True: os.write(2, b'x' * 100000)",
        ("output",),
    ),
    Attack(
        "flood in one write",
        "os.write(1, b'x' * (50 << 20))",
        ("output",),
    ),
    Attack(
        "a huge error",
        "raise ValueError('x' * (1 << 26))",
        ANY,
    ),
    Attack(
        "recursion",
        """
        sys.setrecursionlimit(10 ** 9)
        def f(n): return f(n + 1) + 1
        f(0)
        """,
        ANY,
        seconds=2,
    ),
    Attack(
        "crash",
        """
        import ctypes
        ctypes.string_at(0)
        """,
        ("error",),
        only="bubblewrap",
    ),
    Attack(
        "raising its own limits",
        """
        import resource
        for name in ('AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE'):
            attempt(lambda: resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (1 << 40, 1 << 40)) or True, name)
        """,
        only="bubblewrap",
    ),
    # ---- other processes
    Attack(
        "killing everything",
        """
        import signal
        try:
            os.kill(-1, signal.SIGKILL)
        except BaseException: pass
        """,
        ANY,
    ),
    Attack(
        "killing its parents",
        """
        import signal
        for pid in (os.getppid(), 1, 2, @PARENT@):
            try: os.kill(pid, signal.SIGKILL)
            except BaseException: pass
        """,
        ANY,
        only="bubblewrap",
    ),
    Attack(
        "killing a process of the host",
        """
        import signal
        for pid in (@VICTIM@, -@VICTIM@):
            attempt(lambda: os.kill(pid, signal.SIGKILL) or True)
        """,
    ),
    Attack(
        "killing its group",
        """
        import signal
        try:
            os.killpg(0, signal.SIGKILL)
        except BaseException: pass
        """,
        ANY,
    ),
    Attack(
        "not to be ended",
        """
        import signal
        for n in range(1, 65):
            try: signal.signal(n, signal.SIG_IGN)
            except BaseException: pass
        while True: pass
        """,
        SPIN,
        seconds=0.5,
    ),
    Attack(
        "stopping itself",
        """
        import signal
        pid = os.fork()
        os.kill(pid or os.getpid(), signal.SIGSTOP)
        os.waitpid(pid, 0)
        """,
        SPIN,
        only="bubblewrap",
        seconds=0.5,
    ),
    Attack(
        "leaving a daemon behind",
        """
        import time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                libc().prctl(15, b'@NONCE@')
                os.closerange(0, 64)
                time.sleep(300)
            os._exit(0)
        time.sleep(0.1)
        print('done')
        """,
        only="bubblewrap",
    ),
    Attack(
        "leaving a daemon behind that writes",
        """
        import time
        if os.fork() == 0:
            os.setsid()
            libc().prctl(15, b'@NONCE@')
            while True: print('daemon', flush=True); time.sleep(0.01)
        time.sleep(0.1)
        """,
        ("exit", "output"),
        only="bubblewrap",
    ),
    Attack(
        "tracing its parent",
        "attempt(lambda: libc().ptrace(16, os.getppid(), 0, 0) == 0)",
        only="bubblewrap",
    ),
    Attack(
        "tracing",
        "attempt(lambda: libc().ptrace(0, 0, 0, 0) == 0)",
        bare=True,
        only="bubblewrap",
    ),
]
