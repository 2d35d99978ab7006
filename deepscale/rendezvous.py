"""Where the ranks of one machine meet: a store that nobody on another machine can reach.

torch's own (`env://`) listens on every interface of the machine, whatever MASTER_ADDR says, and answers whoever asks; gloo and NCCL
take the interface of the host's name. Ranks whose MASTER_ADDR is the loopback address are all on one machine, and need neither.
"""

import errno
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_address

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError
from torch.distributed.rendezvous import register_rendezvous_handler

METHOD = "deepscale-loopback"
LOOPBACK_INTERFACE = "lo"  # Linux's name; elsewhere the libraries choose their own
TOGETHER = timedelta(minutes=5)  # ranks of one machine are started at one time: who is not there by then has ended
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def init_method() -> str | None:
    """The method of torch's init_process_group for the ranks that the environment describes; None for torch's own.

    Where all are on this machine, gloo and NCCL are told to stay on it too, unless the user has named an interface.
    """
    if not is_loopback(os.environ.get("MASTER_ADDR", "127.0.0.1")) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None  # torchrun's agent has a store of its own
    if LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        for name in INTERFACES:
            os.environ.setdefault(name, LOOPBACK_INTERFACE)
    return f"{METHOD}://"


def is_loopback(address: str) -> bool:
    """Whether an address or a name of one is this machine's own, whatever its network."""
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:  # another name
        return False


def meet(url: str, timeout: timedelta = timedelta(minutes=30), **_: object) -> Iterator[tuple[Store, int, int]]:
    """torch's interface of a method: (store, rank, ranks).

    Raises DistNetworkError where the port is taken or rank 0 does not answer, DistStoreError where another rank does not come.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield HashStore(), rank, size
        return
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    listener = _listen(address, port) if rank == 0 else None
    store = TCPStore(address, port, size, rank == 0, min(timeout, TOGETHER), master_listen_fd=listener)
    store.set_timeout(timeout)
    yield store, rank, size


def connect(timeout: timedelta) -> Store:
    """A connection of one's own to the store of several ranks: the process group's is in use while its thread waits for something there."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(f"deepscale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # torchrun's outlives a restart


def _listen(address: str, port: int) -> int:
    """The file descriptor of a socket that listens at this address alone."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=2048).detach()
    except OSError as error:
        raise DistNetworkError(f"{errno.errorcode.get(error.errno or 0, '')} {error}") from None


register_rendezvous_handler(METHOD, meet)
