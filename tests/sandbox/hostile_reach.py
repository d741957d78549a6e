"""Programs that reach for what is not theirs: network, files, descriptors, privileges, the kernel."""

from __future__ import annotations

from hostile_attack import Attack

ATTACKS = [
    # ---- network
    Attack(
        "tcp outside",
        """
        import socket
        attempt(lambda: socket.create_connection(('1.1.1.1', 53), 2))
        """,
    ),
    Attack(
        "dns",
        """
        import socket
        attempt(lambda: socket.getaddrinfo('example.com', 80))
        """,
    ),
    Attack(
        "dns by hand",
        """
        import socket
        s = lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        attempt(lambda: s().sendto(b'x' * 20, ('8.8.8.8', 53)))
        """,
    ),
    Attack(
        "tcp to a service of the host",
        """
        import socket
        attempt(lambda: socket.create_connection(('127.0.0.1', @PORT@), 2).recv(100) == b'@SECRET@')
        """,
        bare=True,
    ),
    Attack(
        "tcp to a service of the host, IPv6-mapped",
        """
        import socket
        def f():
            s = socket.socket(socket.AF_INET6)
            s.settimeout(2)
            s.connect(('::ffff:127.0.0.1', @PORT@))
            return s.recv(100) == b'@SECRET@'
        attempt(f)
        """,
    ),
    Attack(
        "udp to a service of the host",
        """
        import socket
        attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))
        """,
        bare=True,
    ),
    Attack(
        "listening",
        """
        import socket
        def f():
            s = socket.socket()
            s.bind(('0.0.0.0', 0))
            s.listen()
            return True
        attempt(f)
        """,
        bare=True,
    ),
    Attack(
        "unix socket of the host",
        """
        import socket
        def f():
            s = socket.socket(socket.AF_UNIX)
            s.connect('@FOLDER@/socket')
            return s.recv(100) == b'@SECRET@'
        attempt(f)
        """,
        bare=True,
    ),
    Attack(
        "abstract unix socket of the host",
        """
        import socket
        def f():
            s = socket.socket(socket.AF_UNIX)
            s.connect('\\0@ABSTRACT@')
            return s.recv(100) == b'@SECRET@'
        attempt(f)
        """,
        bare=True,
    ),
    Attack(
        "netlink",
        """
        import socket
        attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        """,
        bare=True,
    ),
    Attack(
        "raw packets",
        """
        import socket
        attempt(lambda: socket.socket(17, socket.SOCK_RAW, 768))
        """,
    ),
    Attack(
        "vsock to the hypervisor",
        """
        import socket
        attempt(lambda: socket.socket(40, socket.SOCK_STREAM))
        """,
    ),
    # ---- files, environment, descriptors
    Attack(
        "password file",
        "attempt(lambda: 'root:' in open('/etc/passwd').read())",
        bare=True,
    ),
    Attack(
        "repository",
        "attempt(lambda: os.listdir('@REPOSITORY@'))",
        bare=True,
    ),
    Attack(
        "homes and more",
        """
        for name in 'root home etc var srv mnt opt run boot sys usr/local/bin usr/src'.split():
            attempt(lambda: os.listdir('/' + name), name)
        """,
        bare=True,
    ),
    Attack(
        "a file of the host",
        "attempt(lambda: '@SECRET@' in open('@FOLDER@/secret').read())",
        bare=True,
    ),
    Attack(
        "symbolic link to a file of the host",
        """
        def f():
            os.symlink('@FOLDER@/secret', 'link@NONCE@')
            return '@SECRET@' in open('link@NONCE@').read()
        attempt(f)
        """,
        bare=True,
    ),
    Attack(
        "hard link to a file of the host",
        "attempt(lambda: os.link('@FOLDER@/secret', 'hard') or True)",
    ),
    Attack(
        "the file by other roads",
        """
        for road in ('/proc/self/root', '/proc/1/root', '/proc/@PARENT@/root', '/tmp/../..', '/proc/self/cwd/../..'):
            attempt(lambda: '@SECRET@' in open(road + '@FOLDER@/secret').read(), road)
        """,
        bare=True,
    ),
    Attack(
        "environment",
        "attempt(lambda: '@SECRET@' in str(os.environ))",
        bare=True,
    ),
    Attack(
        "environment of other processes",
        """
        import glob
        for name in ['/proc/1/environ', '/proc/@PARENT@/environ', *glob.glob('/proc/*/environ')]:
            attempt(lambda: b'@SECRET@' in open(name, 'rb').read(), name)
        """,
        bare=True,
    ),
    Attack(
        "open descriptors",
        """
        def f(n):
            os.lseek(n, 0, 0)
            return b'@SECRET@' in os.read(n, 1000)
        for n in range(3, 256):
            attempt(lambda: f(n))
        """,
        bare=True,
    ),
    Attack(
        "arguments of other processes",
        """
        import glob
        attempt(lambda: len(glob.glob('/proc/[0-9]*')) > 4)
        """,
        bare=True,
    ),
    Attack(
        "writing to the system",
        """
        for name in ('/usr/lib/@NONCE@', '/usr/bin/@NONCE@', '/lib64/@NONCE@', '/@NONCE@', '/dev/@NONCE@', '/usr/@NONCE@'):
            attempt(lambda: open(name, 'w').write('x'), name)
        """,
    ),
    Attack(
        "writing anywhere but /tmp",
        """
        for root, folders, files in os.walk('/'):
            if root.startswith('/tmp'): continue
            if root.count('/') > 2: folders.clear()
            try:
                open(os.path.join(root, 'x'), 'w').write('x')
            except OSError: continue
            print('ESC' + 'APED', root)
        """,
        seconds=8,
    ),
    Attack(
        "replacing the interpreter",
        "attempt(lambda: open(sys.executable or '/usr/bin/python3', 'r+b').write(b'x'))",
    ),
    Attack(
        "devices",
        """
        for name in ('mem', 'kmem', 'kmsg', 'port', 'vda', 'sda', 'nvme0n1', 'kvm', 'fuse', 'tty', 'console', 'ptmx', 'vsock',
                     'nvidia0', 'nvidiactl', 'userfaultfd', 'net/tun', 'loop-control', 'cpu_dma_latency', 'shm/x'):
            attempt(lambda: os.open('/dev/' + name, os.O_RDWR) and True, name)
        """,
    ),
    Attack(
        "making a device",
        """
        import stat
        attempt(lambda: os.mknod('disk', 0o666 | stat.S_IFBLK, os.makedev(254, 0)) or True)
        """,
    ),
    # ---- privileges and the kernel
    Attack(
        "becoming root",
        """
        for name in ('setuid', 'seteuid', 'setgid', 'setegid'):
            attempt(lambda: getattr(os, name)(0) or True, name)
        attempt(lambda: os.setgroups([0]) or True)
        attempt(lambda: os.getuid() == 0 or os.geteuid() == 0)
        """,
    ),
    Attack(
        "a setuid program",
        """
        def f():
            open('/tmp/s', 'wb').write(open('/usr/bin/python3.11', 'rb').read(100))
            os.chmod('/tmp/s', 0o4777)
            os.chown('/tmp/s', 0, 0)
            return True
        attempt(f)
        for name in ('su', 'sudo', 'mount', 'passwd', 'newgrp', 'bwrap', 'pkexec'):
            attempt(lambda: os.path.exists('/usr/bin/' + name), name)
        """,
    ),
    Attack(
        "a shell",
        """
        import subprocess
        attempt(lambda: subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0)
        """,
        bare=True,
    ),
    Attack(
        "mounting",
        """
        l = libc()
        attempt(lambda: l.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0)
        attempt(lambda: l.umount2(b'/tmp', 2) == 0)
        attempt(lambda: l.mount(None, b'/usr/lib', None, 0x1020, None) == 0)
        """,
        only="bubblewrap",
    ),
    Attack(
        "new namespaces",
        """
        l = libc()
        for flag in (0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x80):
            attempt(lambda: l.unshare(flag) == 0, hex(flag))
        attempt(lambda: l.unshare(0x10000000 | 0x20000) == 0)
        """,
        only="bubblewrap",
    ),
    Attack(
        "new namespaces by clone",
        """
        import platform
        number = {'x86_64': 56, 'aarch64': 220}[platform.machine()]
        def f(flags):
            pid = syscall(number, flags | 17, 0, 0, 0, 0)
            return pid
        attempt(lambda: f(0x10000000))
        attempt(lambda: f(0x40000000))
        attempt(lambda: syscall(435, 0, 0))
        """,
        only="bubblewrap",
    ),
    Attack(
        "changing the root",
        "attempt(lambda: os.chroot('/tmp') or True)",
    ),
    Attack(
        "dangerous system calls",
        """
        import platform, ctypes
        n = {'x86_64': 0, 'aarch64': 1}[platform.machine()]
        calls = {'bpf': (321, 280), 'keyctl': (250, 219), 'add_key': (248, 217), 'perf': (298, 241), 'userfaultfd': (323, 282),
                 'io_uring': (425, 425), 'open_by_handle': (304, 265), 'fsopen': (430, 430), 'open_tree': (428, 428),
                 'statmount': (457, 457), 'setns': (308, 268), 'kexec': (246, 104), 'syslog': (103, 116), 'reboot': (169, 142)}
        for name, numbers in calls.items():
            ctypes.set_errno(0)
            ok = syscall(numbers[n], 0, 0, 0, 0, 0)
            print('ESC' + 'APED' if ok or ctypes.get_errno() not in (1, 38) else 'refused', name, ctypes.get_errno())
        """,
        only="bubblewrap",
    ),
    Attack(
        "typing into a terminal",
        """
        import fcntl
        attempt(lambda: fcntl.ioctl(0, 0x5412, b'x') is not None)
        """,
        only="bubblewrap",
    ),
    Attack(
        "host name and clock",
        """
        import time
        attempt(lambda: __import__('socket').sethostname('x') or True)
        attempt(lambda: time.clock_settime(0, 0) or True)
        """,
    ),
    Attack(
        "leaving WebAssembly",
        "import ctypes",
        only="wasm",
    ),
    Attack(
        "processes in WebAssembly",
        """
        import subprocess
        attempt(lambda: subprocess.run(['true']))
        """,
        only="wasm",
    ),
]
