"""A filter on system calls for the bubblewrap sandbox, as classic BPF that the kernel checks before every call.

It takes away what a calculation never needs and where most of the kernel's holes have been: new namespaces (and with them all
of mounting), tracing, kernel keys, BPF, io_uring, userfaultfd, perf; memory that no limit counts (System V segments, memfd);
and all sockets but UNIX ones: vsock, which reaches the host of a virtual machine, is bound to no network namespace. Calls that
are newer than this table do not exist either. A refused call fails with an error and does not kill, so that libraries can do
without it.

Source: seccomp(2), linux/filter.h, linux/seccomp.h, linux/audit.h. Numbers: the kernel's unistd tables of both processors.
"""

from __future__ import annotations

import platform
import struct

# name: (x86-64, arm64); None: the processor has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "_sysctl": (156, None),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_mempolicy": (239, 236),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "remap_file_pages": (216, 234),
    "request_key": (249, 218),
    "semget": (64, 190),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, None),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "ustat": (136, None),
    "vhangup": (153, 58),
    "vmsplice": (278, 75),
}
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR, _IOCTL = (56, 220), (435, 435), (41, 198), (53, 199), (16, 29)
# From statmount on, calls are newer than this table; they have the same numbers on both processors.
_FIRST_UNKNOWN = 457
_X32 = 0x40000000  # calls of the x32 interface have this bit
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* that clone(2) knows
_AF_UNIX = 1
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # typing into a terminal

_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low halves of the arguments

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def program(machine: str | None = None) -> bytes | None:
    """The filter as an array of `struct sock_filter` for `bwrap --seccomp`; None for a processor that the table lacks."""
    known = _MACHINES.get(machine or platform.machine())
    if known is None:
        return None
    column, arch = known
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    if column == 0:
        code += _if(_AT_LEAST, _X32, _ERRNO | _ENOSYS)
    code += _if(_AT_LEAST, _FIRST_UNKNOWN, _ERRNO | _ENOSYS)
    # C libraries then use clone(2), whose flags can be looked at.
    code += _if(_EQUAL, _CLONE3[column], _ERRNO | _ENOSYS)
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += _if(_EQUAL, number, _ERRNO | _EPERM)
    code += _when(_CLONE[column], _ARGUMENT_0, _if(_ANY_BIT, _NEW_NAMESPACES, _ERRNO | _EPERM))
    for call in (_SOCKET, _SOCKETPAIR):
        only_unix = [_op(_EQUAL, _AF_UNIX, 1, 0), _op(_RETURN, _ERRNO | _EAFNOSUPPORT)]
        code += _when(call[column], _ARGUMENT_0, only_unix)
    terminal = _if(_EQUAL, _TIOCSTI, _ERRNO | _EPERM) + _if(_EQUAL, _TIOCLINUX, _ERRNO | _EPERM)
    code += _when(_IOCTL[column], _ARGUMENT_1, terminal)
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _if(test: int, value: int, result: int) -> list[bytes]:
    """Returns `result` if the loaded number passes the test."""
    return [_op(test, value, 0, 1), _op(_RETURN, result)]


def _when(call: int, argument: int, body: list[bytes]) -> list[bytes]:
    """For one call: loads an argument, runs `body`, and allows what passes it."""
    inner = [_op(_LOAD, argument), *body, _op(_RETURN, _ALLOW)]
    return [_op(_EQUAL, call, 0, len(inner)), *inner]
