"""Compiling everything a run will need before it begins, and keeping it for the next start."""

import hashlib
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)
GIB = 2**30
_THREAD = "compiling"


def deterministic() -> None:
    """Makes XLA compile for GPUs only what gives the same bits every time; before JAX looks at the devices.

    `xla_gpu_deterministic_ops` excludes operations of which that cannot be said, and the choice of kernels by measured
    time (openxla/xla, xla/xla.proto); a program that cannot do without such an operation fails to compile.

    Raises:
      ValueError: the environment's XLA_FLAGS say the contrary.
    """
    given = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    if contrary := re.search(r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops=(?i:false|0)\b", given):
        raise ValueError(f"XLA_FLAGS has {contrary[0]}, which contradicts --deterministic: take one of the two away")
    os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_deterministic_ops=true".strip()


def keep_programs(folder: str) -> None:
    """Lets JAX keep compiled programs in a folder, from now on in the whole process; "" changes nothing.

    Where the environment or the program named a folder of JAX's own, that one is used.
    """
    if folder and not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser() / _processor()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compilation_cache.reset_cache()  # JAX looks at the setting once, when it first compiles


def _processor() -> str:
    """A name for this kind of processor: programs for a CPU use what it can, and homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def begin(step: Any, *arguments: Any, name: str) -> Callable[[], Any]:
    """Traces a jitted training step, and begins to compile it in a thread of its own.

    Tracing stays in the caller's thread: it is Python, which threads do not speed up, and settings of JAX may be those
    of that thread only. Compiling runs nothing on the devices, so it changes no order in which processes talk to each
    other; where it times kernels, on GPUs, XLA runs nothing else meanwhile (openxla/xla, gpu_executable.cc).

    Args:
      step: from `sharding.jit_step`.
      *arguments: shapes and shardings of what it will be called with.
      name: what messages call it.

    Returns:
      what waits for the program, to be called once. It raises what the compiler raised, and ValueError where the
      devices have too little memory for the program.
    """
    started = time.perf_counter()
    lowered = step.lower(*arguments)
    thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD)
    compiling = thread.submit(lambda: (lowered.compile(), time.perf_counter() - started))
    thread.shutdown(wait=False)  # it ends with its work

    def compiled() -> Any:
        program, seconds = compiling.result()
        log.info("compiled %s in %.1f s", name, seconds)
        check_memory(program.memory_analysis(), jax.local_devices()[0].memory_stats(), name=name)
        return program

    return compiled


def under_way() -> bool:
    """Whether something is being compiled that `begin` began; Python's own exit would wait for that."""
    return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


def memory_in_use(needed: Any) -> int:
    """Bytes that a program's arguments, results and temporaries take, by its `memory_analysis()`."""
    # Arguments that come back changed, in the same memory, are counted once.
    return (needed.argument_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
            + needed.temp_size_in_bytes)


def check_memory(needed: Any, device: dict[str, int] | None, *, name: str) -> None:
    """Raises ValueError where a program needs more memory than a device has.

    Args:
      needed: `memory_analysis()` of the compiled program; None where the platform does not tell.
      device: `memory_stats()` of a device; None where the platform does not tell, as on a CPU.
      name: what the message calls the program.
    """
    if needed is None or device is None or "bytes_limit" not in device:
        return
    size = memory_in_use(needed)
    if size > device["bytes_limit"]:
        raise ValueError(f"{name} needs {size / GIB:.1f} GiB of a device that has {device['bytes_limit'] / GIB:.1f} "
                         "GiB: add --config.train.accumulate=N for smaller micro-batches, or "
                         "--config.model.remat=full; a run may continue with either")
