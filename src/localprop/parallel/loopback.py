"""The network interface that only processes of this machine reach."""

import fcntl
import socket
import struct
import sys

from localprop.errors import ParallelError

_FLAGS = 0xC0206911 if sys.platform == "darwin" else 0x8913  # SIOCGIFFLAGS: the kernel's flags of an interface
_UP, _LOOPBACK = 0x1, 0x8


def loopback_interface() -> str:
    """The name of the loopback interface, such as lo.

    Raises:
        ParallelError: there is none that is up.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, _FLAGS, struct.pack("16s16x", name.encode()))
            except OSError:  # it has vanished since
                continue
            (flags,) = struct.unpack("16xH14x", answer)
            if flags & _UP and flags & _LOOPBACK:
                return name
    raise ParallelError("this machine has no loopback interface that is up; --nproc needs it: ip link set lo up")
