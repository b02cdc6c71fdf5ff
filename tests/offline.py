"""Runs a module as `python -m` does, and then uses the models that ship, where nothing may ask the network.

`python -m tests.offline MODULE ARGUMENT...`; who asks is named, also where a library would go on without an answer.
"""

import contextlib
import runpy
import socket
import sys

ASKED: list[str] = []
LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "", None)


def refuse() -> None:
    """Lets Python reach this machine alone, from now on."""
    getaddrinfo, connect = socket.getaddrinfo, socket.socket.connect

    def found(host, *arguments, **options):
        if host not in LOCAL:
            ASKED.append(f"who is {host}")
            raise socket.gaierror(socket.EAI_NONAME, f"{host}: this test has no network")
        return getaddrinfo(host, *arguments, **options)

    def connected(self, address):
        if isinstance(address, tuple) and address[0] not in LOCAL:
            ASKED.append(f"to {address}")
            raise OSError(f"{address}: this test has no network")
        return connect(self, address)

    socket.getaddrinfo, socket.socket.connect = found, connected  # pyright: ignore


if __name__ == "__main__":
    refuse()
    sys.argv[:] = sys.argv[1:]
    with contextlib.suppress(SystemExit):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

    import vqrae_jax

    model, generator = vqrae_jax.load("nano"), vqrae_jax.load_generator("nano")
    print(model.decode_from_indices(generator.sample(1)).shape)
    if ASKED:
        sys.exit(f"the network was asked: {ASKED}")
