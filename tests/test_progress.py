"""Progress bars in a notebook, which may have no widgets."""

import subprocess
import sys


def test_a_notebook_without_widgets():
    """Bars are lines of text there, without a warning, and move as on a terminal."""
    code = """
import sys, types
sys.modules |= {name: types.ModuleType(name) for name in ("ipykernel", "ipykernel.zmqshell")}
sys.modules |= {"IPython": types.SimpleNamespace(get_ipython=object), "ipywidgets": None}
from distilbert_jax.machine.progress import bar, say
with bar(total=2, desc="test") as progress:
    progress.update()
    say("a line")
    assert progress.mininterval == 0.5 and "notebook" not in type(progress).__mro__[1].__module__
"""
    done = subprocess.run([sys.executable, "-W", "error::tqdm.TqdmWarning", "-c", code],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a line\n" in done.stderr and "Warning" not in done.stderr and "test: " in done.stderr
