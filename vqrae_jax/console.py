"""What a verb says on stderr is said by us alone.

Libraries write there too: their threads, worker processes and C++ code, through logging, hooks of the interpreter or
none, and many print a stack of something that we put into one line. There are more ways than can be closed one by one,
so file descriptor 2 itself becomes a file of its own, before anything runs, and we keep what it was.
"""

import os
import subprocess
import sys
import tempfile
import traceback
from typing import TextIO

# A process that a library aborts, or that crashes, says nothing more. This one waits for its end and says it instead,
# if the file shows that it was so. It gets no signal of the terminal, and ends with the process in any case.
_WITNESS = r"""
import os, re, sys
sys.stdin.read()
said = re.search(r"^F\d{4} [^]]*\] *(.+)|^Fatal Python error: (.+)", open(sys.argv[1], errors="replace").read(), re.M)
if said:
    print("error: a library or the system ended this process:", (said[1] or said[2]).strip() + ";", sys.argv[1],
          "holds what it said", file=sys.stderr)
else:
    os.unlink(sys.argv[1])
"""


class Stderr:
    """Takes stderr for this process, and those that it starts.

    Attributes:
      stream: what still leads to where stderr did.
    """

    stream: TextIO

    def __init__(self):
        if sys.stderr is None:  # it was closed
            sys.stderr = open(os.devnull, "w")
        sys.stderr.flush()
        taken = sys.stderr.fileno()
        self.stream = open(os.dup(taken), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
        self._file = self._witness = None
        try:
            kept, self._file = tempfile.mkstemp(prefix="vqrae_jax.", suffix=".log")
        except OSError:  # no folder for temporary files can be written
            kept = os.open(os.devnull, os.O_WRONLY)
        else:
            self._witness = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WITNESS, self._file],
                                             stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        os.dup2(kept, taken)
        os.close(kept)

    def end(self, error: BaseException | None = None) -> str | None:
        """Nothing will be said any more, whatever happens until the process ends.

        Args:
          error: what is to be kept with what libraries said, and where it was raised.

        Returns:
          the file that keeps it; None where there is no error, or no place for one.
        """
        file, self._file = self._file, None
        if file is None:
            return None
        if self._witness:
            self._witness.kill()
            self._witness.wait()
        try:
            if error is None:
                os.unlink(file)
                return None
            with open(file, "a") as kept:
                traceback.print_exception(error, file=kept)
            return file
        except OSError:
            return None
