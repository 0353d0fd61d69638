"""What happens on Colab, tried here: ``python -m tests.colab [chapter]``.

In a fresh environment that holds Jupyter, torch and numpy and knows nothing of this checkout, the chapter's own setup
cell installs the package from a wheel built now; torch and numpy must stay as they were, and the chapter must run to its
end. Needs the package index, so it is a command of its own (make colab) and not part of make test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .notebooks import CHAPTERS, ROOT

VERSIONS = "import torch, numpy; print(torch.__version__, numpy.__version__)"


def main() -> None:
    """Build the wheel, make the environment, run the chapter."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else "01"
    chapter = next(p for p in CHAPTERS if p.name.startswith(wanted))
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        run = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(there), str(ROOT)]
        subprocess.run(run, check=True)
        wheel = next(there.glob("seqarch-*.whl"))
        subprocess.run([sys.executable, "-m", "venv", str(there / "env")], check=True)
        python = there / "env" / "bin" / "python"
        pins = ["-c", str(ROOT / "constraints.txt")]  # any torch and numpy will do; these are the ones at hand
        packages = ["torch", "numpy", "nbclient", "nbconvert", "ipykernel", "ipywidgets"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *packages], check=True)
        before = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout
        assert subprocess.run([python, "-c", "import seqarch"], capture_output=True).returncode != 0

        shutil.copy(chapter, there / chapter.name)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"SEQARCH_SOURCE": wheel.as_uri(), "SEQARCH_EXPLORE": "stored"}
        command = [python, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", chapter.name]
        subprocess.run(command, cwd=there, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout
        if after != before:
            sys.exit(f"expected torch and numpy to stay {before.strip()}, got {after.strip()}")
        print(f"{chapter.name} ran to its end from {wheel.name}; torch and numpy stayed {after.strip()}")


if __name__ == "__main__":
    main()
