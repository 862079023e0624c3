"""A folder has one writer at a time, and a dead one leaves neither a lock nor files behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from stepinfluence import StoreError, writers
from stepinfluence.files import write_bytes

HOLDER = """
    import sys, time
    from pathlib import Path
    from stepinfluence import writers
    with writers.locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        with pytest.raises(StoreError) as caught, writers.locked(tmp_path / "run"):
            pass
        assert f"(process {first.pid} on {socket.gethostname()}, since 20" in str(caught.value)
        first.kill()
        first.wait()
        assert (tmp_path / "run" / writers.LOCK).exists(), "it was killed"
        with writers.locked(tmp_path / "run"):  # the system has let the lock go
            pass
    assert not (tmp_path / "run" / writers.LOCK).exists()


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writers.locked(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with writers.locked(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("")
        with pytest.raises(StoreError, match=f"process {os.getpid()} on "), writers.locked(tmp_path / "used"):
            pass
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["file"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"), writers.locked(tmp_path / "file"):
        pass


def test_files_aside_tell_their_writer(tmp_path: Path) -> None:
    (tmp_path / "within").mkdir()
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom stepinfluence.files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda made: (made.write_text(''), os.kill(os.getpid(), 9)))"
    )
    for place in (tmp_path, tmp_path / "within"):
        killed = subprocess.run([sys.executable, "-c", code, str(place / "b.json")], check=False)
        assert killed.returncode == -signal.SIGKILL
    for name in (writers.aside(tmp_path / "a.json").name, f"{writers.ASIDE}{writers.host()}-99999999999-00000000-x"):
        (tmp_path / name).write_text("")
    assert len(list(tmp_path.rglob(".aside-*"))) == 4
    writers.remove_leftovers(tmp_path)
    assert len(list(tmp_path.rglob(".aside-*"))) == 2, "this process's own, and that in a folder within"
    writers.remove_leftovers(tmp_path, within=True)
    (left,) = tmp_path.rglob(".aside-*")
    assert str(os.getpid()) in left.name
    write_bytes(tmp_path / "a.json", b"{}")
    assert writers.unknown_files(tmp_path, ("a.json", "within")) == []
    assert writers.unknown_files(tmp_path, ("within",)) == ["a.json"]


def test_what_a_killed_save_of_tensors_leaves_names_its_writer(tmp_path: Path) -> None:
    """safetensors writes to a file of its own first, under a name that tells nothing."""
    code = (
        "import os, sys\nfrom pathlib import Path\nimport safetensors.torch\nfrom stepinfluence.files import *\n"
        "def save(tensors, path, metadata):\n"
        "    (Path(path).parent / '.tmpAbCdEf').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "safetensors.torch.save_file = save\n"
        "write_atomically(Path(sys.argv[1]), lambda made: save_tensors({}, made))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob(".tmpAbCdEf"))
    writers.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


SIGNALLED = """
    import os, signal, sys
    from pathlib import Path
    from stepinfluence import writers

    folder, count = Path(sys.argv[1]), int(sys.argv[2])

    class Stopped(KeyboardInterrupt):
        pass

    def stop(*_):
        raise Stopped

    signal.signal(signal.SIGTERM, stop)

    def strike(frame, event, argument):
        global count
        if frame.f_code.co_filename == writers.__file__ and event == "line":
            count -= 1
            if count == 0:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGTERM)
        return strike

    sys.settrace(strike)
    try:
        with writers.locked(folder):
            pass
    except Stopped:
        writers.remove_own_leftovers()
        sys.exit(143)
"""


@pytest.mark.parametrize("first", [1, 26])
def test_a_signal_at_any_line_leaves_no_lock(tmp_path: Path, first: int) -> None:
    codes = []
    for count in range(first, first + 25):
        command = [sys.executable, "-c", textwrap.dedent(SIGNALLED), str(tmp_path / "run"), str(count)]
        codes.append(subprocess.run(command, check=False, timeout=60).returncode)
        assert not (tmp_path / "run").exists(), count
        if codes[-1] == 0:
            break
    assert set(codes) <= {0, 143}
    assert 143 in codes


def test_what_killed_writers_left_is_removed_once_a_file_is_written_there(tmp_path: Path) -> None:
    """In a folder that may be anybody's: only what bears the name of a writer that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f"{writers.ASIDE}{writers.host()}-{gone.pid}-12345678-state.pt{end}" for end in ("", ".folder")]
    left[0].write_text("half")
    left[1].mkdir()
    own, foreign = writers.aside(tmp_path / "other"), tmp_path / f"{writers.ASIDE}notes"
    for path in (own, foreign):
        path.write_text("kept")
    os.utime(foreign, (0, 0))
    write_bytes(tmp_path / "state.pt", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([own, foreign, tmp_path / "state.pt"])
