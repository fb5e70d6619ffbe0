"""What listens where in a run of several processes, and how they end when their launcher is killed."""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from PIL import Image

from localprop.errors import ParallelError
from localprop.parallel import loopback
from localprop.parallel.loopback import loopback_interface
from localprop.system.commands import interpreter_words
from ranks import SECONDS, flags, wait_for_step

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")


def listening(*processes):
    """The addresses at which processes listen, over TCP of either kind, as the kernel tells."""
    sockets, found = set(), []
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except FileNotFoundError:  # closed by now
                continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, own, _, state, *_, number = line.split()[:10]
            if state == "0A" and f"socket:[{number}]" in sockets:
                words = bytes.fromhex(own.partition(":")[0])
                order = [struct.unpack("=I", words[i : i + 4])[0].to_bytes(4, "big") for i in range(0, len(words), 4)]
                found.append(ip_address(b"".join(order)))
    return found


def descendants(process):
    """The processes that a process started, and those that these did."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def other_interface():
    """An interface that is not the loopback; where there is none, a name that none has."""
    names = [name for _, name in socket.if_nameindex() if name != loopback_interface()]
    usable = [name for name in names if Path(f"/sys/class/net/{name}/operstate").read_text().strip() == "up"]
    return usable[0] if usable else "absent0"


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::"), (socket.AF_INET6, "::1")],
)
def test_a_socket_that_listens_is_seen_with_its_address(family, address):
    before = listening(os.getpid())
    try:
        listener = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("there is no such address here")
    with listener:
        assert sorted(map(str, listening(os.getpid()))) == sorted([*map(str, before), address])


def gone(processes):
    """The processes that are left after 10 seconds; zombies wait for nobody but who should read their exit code."""
    end = time.monotonic() + 10
    while time.monotonic() < end and (left := [pid for pid in processes if is_alive(pid)]):
        time.sleep(0.05)
    return left


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
def test_nothing_listens_beyond_the_loopback_and_all_end_with_the_launcher(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "localprop", "train", *flags(tmp_path, 2, "--epochs", "400")]
    launcher = subprocess.Popen(
        [*command, "--parallel", "modules", "--nproc", "2"],
        # Another interface than the one that is to be used.
        env=os.environ | {"TMPDIR": str(temporary), "GLOO_SOCKET_IFNAME": other_interface()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = []
    try:
        wait_for_step(tmp_path, 5)
        children = descendants(launcher.pid)
        assert len(children) == 2
        assert listening(launcher.pid) == []
        for child in children:
            addresses = listening(child)
            assert addresses, "the processes do not talk over sockets that are seen here"
            assert [str(address) for address in addresses if not address.is_loopback] == []
        (folder,) = temporary.glob("localprop-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        launcher.send_signal(signal.SIGKILL)
        assert gone(children) == []
        _, told = launcher.communicate(timeout=SECONDS)
    finally:
        launcher.kill()
        for child in filter(is_alive, children):
            os.kill(child, signal.SIGKILL)
    assert told.startswith("localprop: stopped by SIGTERM; everything is in ")
    assert [name for kind in ("localprop", "torchelastic", "pymp") for name in temporary.glob(f"{kind}*")] == []


ABANDONED = """
import multiprocessing, os, signal, time
from pathlib import Path
from localprop.system import launched
launched._GRACE_SECONDS = 0.3  # of a job
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
worker.start()
Path("FOLDER.worker").write_text(str(worker.pid))
reading, writing = os.pipe()
os.environ |= {"LOCALPROP_JOB": "FOLDER", "LOCALPROP_PIPE": str(reading)}

def stop(*_):
    Path("FOLDER.asked").write_text("to stop")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends a run that hangs
if "WHEN" != "before training":
    signal.signal(signal.SIGTERM, stop)
    trains = launched.stops_cleanly()
    trains.__enter__()
if "WHEN" == "while it saves":  # the launcher has passed a SIGTERM on
    os.kill(os.getpid(), signal.SIGTERM)
launched.watch_launcher()
started = time.monotonic()
launched.leave = lambda code, leave=launched.leave: leave(code if time.monotonic() - started >= AT_LEAST else 1)
os.close(writing)  # as when the launcher dies
end = time.monotonic() + 60
while time.monotonic() < end:  # a step that does not end
    time.sleep(0.1)
"""


@pytest.mark.processes
@pytest.mark.parametrize(("when", "grace"), [("before training", 0), ("while it trains", 0.3), ("while it saves", 0.3)])
def test_a_process_that_does_not_stop_in_time_ends_anyway_with_its_workers(forker, tmp_path, when, grace):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "store").touch()
    code = ABANDONED.replace("FOLDER", str(folder)).replace("WHEN", when).replace("AT_LEAST", str(grace))
    ranks = forker.start(tmp_path / "log", 1, code=code)
    assert ranks.wait() == [143], ranks.log.read_text()
    assert (tmp_path / "job.asked").exists() == (when != "before training")
    assert gone([int((tmp_path / "job.worker").read_text())]) == []
    assert not folder.exists()


def test_a_process_ends_with_its_launcher_while_torch_is_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    reading, writing = os.pipe()
    monkeypatch.setenv("LOCALPROP_PIPE", str(reading))
    process = subprocess.Popen(interpreter_words("train"), pass_fds=[reading])
    os.close(writing)
    os.close(reading)
    try:
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
        process.wait()


STREAMS = """
import os, tempfile
tempfile.tempdir = "TEMPORARY"
from localprop.settings.config import DataConfig
from localprop.data.loading import load_data
from localprop.system.launched import leave
data = load_data(DataConfig(data="folder:IMAGES", workers=2), 8, 0)
for epoch in range(3):
    assert sum(len(images) for images, _ in data.test_batches(2, "cpu")) == 4
    assert len(os.listdir("TEMPORARY")) == 1, os.listdir("TEMPORARY")
leave(0)
"""


@pytest.mark.processes
def test_processes_that_decode_images_leave_no_folders_behind(forker, tmp_path):
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (images / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (300, 300)).save(images / split / name / f"{number}.png")
    # Workers make sockets in it, and the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        code = STREAMS.replace("TEMPORARY", temporary).replace("IMAGES", str(images))
        ranks = forker.start(tmp_path / "log", 1, code=code)
        assert ranks.wait() == [0], ranks.log.read_text()
        assert list(Path(temporary).iterdir()) == []


CHOOSES = """
import localprop.parallel.job as job
job.loopback_interface = lambda: "absent0"
try:
    job.join("cpu")
except job.ParallelError as error:
    print(error, file=sys.stderr) if "absent0" in str(error) else exit(3)
else:
    exit(4)
"""


@pytest.mark.processes
def test_processes_of_one_machine_talk_over_the_interface_that_is_chosen(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code="import sys\n" + CHOOSES)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    assert "the processes do not find each other" in ranks.log.read_text()


def test_the_loopback_interface_has_the_loopback_address():
    name = loopback_interface()
    kind = Path(f"/sys/class/net/{name}/type")
    assert not kind.exists() or kind.read_text().strip() == "772"  # the kernel's number for loopback interfaces


def test_the_loopback_interface_is_found_whatever_it_is_called(monkeypatch):
    flags = {"veth0": 0x1043, "eth0": 0x1043, "lo0": 0x49, "lo9": 0x8}
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(flags)))

    def ioctl(_, request, packed):
        name = struct.unpack("16s16x", packed)[0].rstrip(b"\0").decode()
        if name == "veth0":
            raise OSError(errno.ENODEV, "No such device")  # it has vanished since it was listed
        return struct.pack("16sH14x", name.encode(), flags[name])

    monkeypatch.setattr(loopback.fcntl, "ioctl", ioctl)
    assert loopback_interface() == "lo0"
    del flags["lo0"]  # the last one is down
    with pytest.raises(ParallelError, match="no loopback interface that is up") as caught:
        loopback_interface()
    assert "\n" not in str(caught.value)
