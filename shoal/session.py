"""Where a node keeps its files, and how processes of one machine find each other and the token.

    <base>/                           $SHOAL_TMPDIR, or shoal-<uid> in the system's temporary folder; 0700, ours
        20260131T120000_1f2e3d4c/     one folder per node (not per cluster: many nodes may share a machine)
            logs/                     stays when the node has ended
            s/                        Unix sockets; a link to a short path where this one would be too long
            token                     the cluster's secret, 0600
            node.json                 a `NodeRecord`; there is no node before it exists

A node is alive while its supervisor is. A pid alone does not say that, since the kernel hands pids out again, so a
record also carries the process's start stamp (`process_stamp`). Stamps name the boot and the pid namespace they were
taken in: containers that share a temporary folder see each other's folders but cannot judge them: they leave them be.
Nothing here locks: folders are made by one process, files are written whole and renamed into place, and readers treat
what vanishes under their hands as gone.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

DEAD_FOLDERS_KEPT: Final = 20
"""Enough to look into yesterday's failures; each holds logs only, and those are rotated."""

MAX_SOCKET_FOLDER_BYTES: Final = 60
"""The kernel takes about 100 bytes for a Unix socket's path; this leaves 40 for the socket's own name."""

MIN_TOKEN_CHARS: Final = 16
STARTING_GRACE_S: Final = 60.0
"""How long a folder that does not say who made it may belong to a node that is just being started."""


class SessionError(RuntimeError):
    """The session's files are not usable as they are; the text is one line that says which and why."""


class TokenMissingError(SessionError):
    """No token was given and none was found."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What `node.json` says about a node: enough to connect to it, to join its cluster and to end it.

    Attributes:
        node_id: hex.
        session: name of the cluster's session, the same on all of its nodes.
        address: "host:port" ("[v6]:port") of this node's one TCP port.
        control_address: the same of the head, where control answers.
        private: made by `init()` for one driver, so that nobody else shall find it.
        supervisor_stamp: `process_stamp(supervisor_pid)` at the start.
        agent_socket, control_socket: Unix socket paths; the latter "" on nodes other than the head.
    """

    node_id: str
    session: str
    address: str
    control_address: str
    is_head: bool
    private: bool
    supervisor_pid: int
    supervisor_stamp: str
    agent_socket: str
    control_socket: str
    started_unix_s: float
    version: str

    def is_alive(self) -> bool:
        """Whether the supervisor runs: it, not another process with its pid. False for one in another pid namespace."""
        return bool(self.supervisor_stamp) and process_stamp(self.supervisor_pid) == self.supervisor_stamp


class LiveNode(NamedTuple):
    """A node of this machine whose supervisor runs."""

    record: NodeRecord
    folder: NodeFolder


class NodeFolder:
    """One node's folder. The object is only a name: several processes hold one for the same folder."""

    __slots__ = ("path",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"NodeFolder({str(self.path)!r})"

    @property
    def spill(self) -> Path:
        """Objects that do not fit into shared memory, unless the user named another place."""
        return self.path / "spill"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def sockets(self) -> Path:
        """Folder for Unix sockets, short enough for names of up to 40 bytes."""
        link = self.path / "s"
        try:
            return Path(os.readlink(link))
        except OSError:  # a folder, not a link
            return link

    @property
    def token_path(self) -> Path:
        return self.path / "token"

    @property
    def info_path(self) -> Path:
        return self.path / "node.json"

    def write_token(self, token: str) -> None:
        _write_private(self.token_path, token + "\n")

    def read_token(self) -> str:
        """Raises SessionError when there is no token file, or when others can read it."""
        return read_token_file(self.token_path)

    def write_info(self, record: NodeRecord) -> None:
        """From now on others find this node."""
        _write_private(self.info_path, json.dumps(asdict(record), indent=1) + "\n")

    def read_info(self) -> NodeRecord | None:
        """None when the node has not got so far, or is gone, or the file comes from a version that we cannot read."""
        try:
            found: Any = json.loads(self.info_path.read_text("utf-8"))
            return NodeRecord(**{name: found[name] for name in _RECORD_FIELDS})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove_traces(self) -> None:
        """Remove all but the logs: sockets, token, record. For a node that has ended."""
        sockets = self.sockets
        shutil.rmtree(sockets, ignore_errors=True)
        shutil.rmtree(self.spill, ignore_errors=True)
        for name in ("s", "token", "node.json", "creator"):
            try:
                (self.path / name).unlink()
            except OSError:  # gone already, or "s" was the folder that rmtree removed
                continue


_RECORD_FIELDS: Final = tuple(field.name for field in fields(NodeRecord))


# ------------------------------------------------------------------------------------------------------- folders


def base_folder(explicit: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that holds this user's node folders, made when it does not exist.

    Raises:
        SessionError: it belongs to somebody else, is a link, or cannot be made.
    """
    chosen = os.fspath(explicit) if explicit is not None else environ.get("SHOAL_TMPDIR", "")
    # Not tempfile.gettempdir(): TMPDIR may differ between two shells of one user, who would then not find each other.
    path = Path(os.path.abspath(chosen)) if chosen else Path(f"/tmp/shoal-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(path)
    except OSError as exc:
        raise SessionError(f"cannot make the folder {path}: {exc.strerror}; name another in SHOAL_TMPDIR") from exc
    if stat.S_ISLNK(found.st_mode) and chosen:
        found = os.stat(path)  # a link that the user named is the user's wish; a planted one is not
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SessionError(f"{path} is not a folder that belongs to you (uid {os.getuid()}); set SHOAL_TMPDIR to one")
    if found.st_mode & 0o022:
        if chosen:
            raise SessionError(f"others may write to {path}; chmod 700 it, or set SHOAL_TMPDIR to another folder")
        os.chmod(path, 0o700)
    return path


def create_node_folder(base: Path | None = None) -> NodeFolder:
    """Make a new node's folder, with `logs/` and `s/` in it, and sweep away what dead nodes left."""
    base = base_folder() if base is None else base
    sweep(base)
    while True:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        folder = NodeFolder(base / f"{stamp}_{secrets.token_hex(4)}")
        try:
            folder.path.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
    _write_private(folder.path / "creator", f"{os.getpid()} {process_stamp(os.getpid())}\n")
    folder.logs.mkdir(mode=0o700)
    sockets = folder.path / "s"
    if len(os.fsencode(sockets)) <= MAX_SOCKET_FOLDER_BYTES:
        sockets.mkdir(mode=0o700)
    else:
        _link_short_folder(sockets)
    return folder


def _link_short_folder(link: Path) -> None:
    """Make a folder with a short path, for which `link` stands; those whose link has vanished with its base go."""
    base = base_folder(environ={})
    for name in os.listdir(base):
        if name.startswith("s_"):
            owner = base / name / "link"
            try:
                if not os.path.lexists(os.readlink(owner)):
                    shutil.rmtree(base / name, ignore_errors=True)
            except OSError:  # it is being made or removed right now
                continue
    short = base / f"s_{secrets.token_hex(4)}"
    os.symlink(short, link)
    short.mkdir(mode=0o700)
    os.symlink(link, short / "link")


def node_folders(base: Path) -> list[NodeFolder]:
    """All node folders, dead ones too, oldest first."""
    try:
        names = sorted(os.listdir(base))
    except OSError:
        return []
    return [NodeFolder(base / name) for name in names if _is_node_name(name)]


def sweep(base: Path) -> None:
    """Remove what dead nodes left, except for logs; of those keep the newest `DEAD_FOLDERS_KEPT`."""
    dead = [folder for folder in node_folders(base) if _is_dead(folder)]
    for folder in dead:
        folder.remove_traces()
    for folder in dead[:-DEAD_FOLDERS_KEPT]:
        shutil.rmtree(folder.path, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- discovery


def live_nodes(base: Path) -> list[LiveNode]:
    """The nodes that run on this machine, oldest first, private ones included."""
    found = [(folder.read_info(), folder) for folder in node_folders(base)]
    alive = [LiveNode(record, folder) for record, folder in found if record is not None and record.is_alive()]
    return sorted(alive, key=lambda node: node.record.started_unix_s)


def find_cluster(base: Path) -> LiveNode | None:
    """The cluster that `address="auto"` means: the newest one that has a node here; its head, when that runs here."""
    shared = [node for node in live_nodes(base) if not node.record.private]
    if not shared:
        return None
    newest = shared[-1]
    same = [node for node in shared if node.record.control_address == newest.record.control_address]
    return next((node for node in same if node.record.is_head), newest)


def find_node(base: Path, address: str) -> LiveNode | None:
    """The running local node that has this address, else the newest one whose cluster's head has it."""
    nodes = live_nodes(base)
    host, _, port = address.rpartition(":")
    meant = {address} if host != "localhost" else {f"127.0.0.1:{port}", f"[::1]:{port}"}
    own = [node for node in nodes if node.record.address in meant]
    joined = [node for node in nodes if node.record.control_address in meant]
    found = own or joined
    return found[-1] if found else None


# --------------------------------------------------------------------------------------------------------- token


def new_token() -> str:
    """32 random bytes, in characters that survive a shell, a URL and an environment variable."""
    return secrets.token_urlsafe(32)


def load_token(
    explicit: str | None = None, folder: NodeFolder | None = None, environ: Mapping[str, str] = os.environ
) -> str:
    """The cluster's token: `explicit`, else SHOAL_TOKEN, else SHOAL_TOKEN_FILE, else the one of the node at `folder`.

    Raises:
        TokenMissingError: there is none.
        SessionError: the one that is there is too short, or others can read its file.
    """
    if explicit:
        return check_token(explicit, "the token given")
    if environ.get("SHOAL_TOKEN"):
        return check_token(environ["SHOAL_TOKEN"], "SHOAL_TOKEN")
    if environ.get("SHOAL_TOKEN_FILE"):
        return read_token_file(Path(environ["SHOAL_TOKEN_FILE"]))
    if folder is not None:
        return folder.read_token()
    raise TokenMissingError(
        "no token: set SHOAL_TOKEN, or SHOAL_TOKEN_FILE to a copy of the file that `shoal start --head` named"
    )


def find_token(base: Path, address: str, environ: Mapping[str, str] = os.environ) -> str:
    """The token for the cluster at `address`: from the environment, else from a node of it that runs here.

    Raises: as `load_token`.
    """
    node = find_node(base, address)
    return load_token(folder=None if node is None else node.folder, environ=environ)


def check_token(token: str, source: str) -> str:
    """`token` without surrounding blanks. Raises SessionError when it is too short to be a secret."""
    token = token.strip()
    if len(token) < MIN_TOKEN_CHARS:
        raise SessionError(f"{source} has {len(token)} characters; a token needs at least {MIN_TOKEN_CHARS}")
    return token


def read_token_file(path: Path) -> str:
    """Raises SessionError when the file is not there, or when people other than its owner can read it."""
    try:
        with open(path, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            # A secret that is mounted for us may be ours through its group only; then the group is not "others".
            forbidden = 0o077 if found.st_uid == os.getuid() else 0o007
            if found.st_mode & forbidden:
                mode = stat.S_IMODE(found.st_mode)
                raise SessionError(f"others can read the token file {path} (mode {mode:04o}); chmod 600 it")
            return check_token(file.read(4096), f"the token file {path}")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise SessionError(f"cannot read the token file {path}: {why}") from exc


# ----------------------------------------------------------------------------------------------------- processes


def process_stamp(pid: int) -> str:
    """A text that this process has and no other ever gets; "" when there is no such process (or only its zombie)."""
    if pid <= 0:
        return ""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The command's name is in parentheses and may hold anything: count fields from behind its end.
            after_name = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start_ticks = after_name[0], after_name[19]
    return "" if state in "ZX" else f"{start_ticks}@{_here()}"


def _here() -> str:
    """The boot and the pid namespace within which a pid means something."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _is_elsewhere(stamp: str) -> bool:
    """Whether the stamp was taken in another pid namespace of this boot: its process may live, we cannot see it."""
    boot, _, namespace = stamp.partition("@")[2].partition("/")
    own_boot, _, own_namespace = _here().partition("/")
    return boot == own_boot and namespace != own_namespace


def _is_dead(folder: NodeFolder) -> bool:
    record = folder.read_info()
    if record is not None:
        return not record.is_alive() and not _is_elsewhere(record.supervisor_stamp)
    try:
        pid, _, stamp = (folder.path / "creator").read_text("utf-8").strip().partition(" ")
        return process_stamp(int(pid)) != stamp and not _is_elsewhere(stamp)
    except (FileNotFoundError, ValueError):  # swept before, or made this very moment
        pass
    try:
        return time.time() - folder.path.stat().st_mtime > STARTING_GRACE_S
    except FileNotFoundError:  # another process sweeps too
        return True


def _is_node_name(name: str) -> bool:
    when, _, tail = name.partition("_")
    return len(when) == 15 and when[8] == "T" and len(tail) == 8


def _write_private(path: Path, text: str) -> None:
    """Write the file whole, readable by its owner only: no reader ever sees a part of it."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(fresh, path)
