"""What every command shares: several processes, one line and code 2 for an error."""

import contextlib
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distilbert_jax.errors import Interrupted, UserError, first_line
from distilbert_jax.evaluation import report
from distilbert_jax.kernels.products import SWITCH, kernels_here, takes_kernels
from distilbert_jax.machine.memory import keep_memory
from distilbert_jax.machine.processes import GO_ON, connect, find_loss, give_up
from distilbert_jax.machine.progress import say


def keep_compiled() -> None:
    """Keep compiled programs for the next start, in the user's cache folder, by machine.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    import jax

    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    # By machine, because a program for one CPU may not run on another that shares the folder.
    folder = Path(home, "distilbert_jax", platform.node())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # Not by say, which would start JAX before the devices are chosen.
        print(f"compiled programs are not kept: {folder}: {error.strerror}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def launch(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Run `command` with its words; what the user can mend ends in one line and code 2."""
    with (contextlib.redirect_stdout(_Lasting(sys.stdout)),
          contextlib.redirect_stderr(_Lasting(sys.stderr)),
          report.called(shlex.join(["distilbert-jax", command.__name__, *argv]))):
        _launch(command, argv)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, outside the training loop, which saves and ends by itself."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _launch(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    before = signal.signal(signal.SIGTERM, _terminate)
    # Else transformers warns, as it is imported, that there is no PyTorch; it is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        takes_kernels()  # or refuses
        keep_memory()
        connect()
        keep_compiled()
        command(argv)
    except Interrupted as stopped:
        say(str(stopped))
        sys.exit(GO_ON)
    except _Terminated as stopped:
        say(f"terminated; {_way_on(stopped) or 'the same command goes on from what is complete'}")
        sys.exit(GO_ON)
    except KeyboardInterrupt as stopped:  # a second one, or outside the training loop
        sys.exit("; ".join(filter(None, ("interrupted", _way_on(stopped)))))
    except Exception as error:
        if loss := find_loss(error):
            give_up(loss)
        line = str(error) if isinstance(error, UserError) else _missing_platform()
        if not line:
            _name_way_out(error)
            raise
        print("error:", *line.split("\n"), file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _way_on(stopped: BaseException) -> str:
    """What the training loop, if it was in it that a signal came, says of its checkpoints."""
    return "; ".join(getattr(stopped, "__notes__", ()))


class _Lasting:
    """A stream that goes on without its reader: what cannot be written is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream or open(os.devnull, "w")  # None: it was closed by who started this
        self._stream.reconfigure(errors="replace")  # it may not take UTF-8

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:  # no reader, or a full disk: from now on nothing is written
            with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _name_way_out(error: Exception) -> None:
    """Let the traceback of a run with kernels end with how to do without them."""
    if kernels_here()[0] in ("gpu", "tpu"):
        error.add_note(f"If a kernel or the compiler is at fault: {SWITCH}=xla before the same "
                       "command runs it without kernels, slower and with more memory.")


def _missing_platform() -> str:
    """A line about JAX_PLATFORMS where no device of it can be used, else ""."""
    import jax

    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError where no plug-in is installed
        reason = f" ({first_line(error)})" if str(error) else ""
        return (f"JAX_PLATFORMS={platforms} names no platform that can be used here{reason}: "
                "install jax for it, free the device, or unset JAX_PLATFORMS")
    return ""
