"""A vLLM server for `sampling.engine=vllm`: found by its URL, or started here.

The server is vLLM's own for the OpenAI protocol, in developer mode, in which it takes weights from
a folder; `rlhf.sampling.vllm` asks it for responses. Commands look for it before they import torch.
Left out: keys, because whoever reaches the developer mode can do anything: keep it on loopback.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rlhf.config import EndpointConfig, InputError, SamplingConfig
from rlhf.console import num_processes, on_several_hosts
from rlhf.http_endpoint import ask, check_endpoint

MODULE = "vllm.entrypoints.openai.api_server"
ENDPOINT = EndpointConfig(timeout=600.0, retries=3)
ONCE = EndpointConfig(timeout=10.0, retries=0)
LONGEST_START = 900.0  # seconds
LONGEST_END = 10.0  # seconds from when a server that dies closes its port to its end
# developer mode takes weights; the other takes LoRA adapters
NEEDED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
# a CPU's share of memory for the cache of keys and values, GiB; else vLLM takes most of the memory
DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def check_server(sampling: SamplingConfig) -> None:
    """Require that the vLLM server of the settings answers, or that one can be started."""
    if sampling.engine != "vllm":
        return
    if sampling.weights == "nccl" and find_spec("vllm") is None:
        raise InputError(
            "sampling.weights=nccl sends with vLLM's NCCL, and the environment of this run has no "
            f"vLLM; install it there: {sys.executable} -m pip install vllm; or set "
            "sampling.weights=files"
        )
    if sampling.url is None and on_several_hosts():
        raise InputError(
            f"sampling.vllm_python starts a server that this host alone can reach, and the "
            f"{num_processes()} processes are on several hosts; start one yourself and give "
            "sampling.url=http://<host>:8000 and sampling.weights_dir=<folder that all hosts see>"
        )
    folder = sampling.weights_dir
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"sampling.weights_dir={folder} does not exist; make it: mkdir -p {folder}"
        )
    if sampling.url is not None:
        check_endpoint(sampling.url, ONCE, "sampling.url")
        model_and_version(sampling.url, "sampling.url", ONCE)
    elif sampling.vllm_python is not None:
        require_vllm(sampling.vllm_python)


def model_and_version(
    url: str, field: str = "sampling.url", endpoint: EndpointConfig = ENDPOINT
) -> tuple[str, str]:
    """Name of the first model of a vLLM server, and vLLM's version."""
    url = url.rstrip("/")
    models = ask(f"{url}/v1/models", None, endpoint, field)
    version = ask(f"{url}/version", None, endpoint, field)
    try:
        return models["data"][0]["id"], version["version"]
    except (LookupError, TypeError) as error:
        raise InputError(
            f"{field}={url} is no vLLM server: its /v1/models or /version has other fields"
        ) from error


def require_vllm(python: str) -> None:
    """Require an interpreter whose environment has vLLM."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"sampling.vllm_python={python} cannot be run ({error}); give the python of an "
            "environment with vLLM, e.g. .venv-vllm/bin/python"
        ) from error
    if found.returncode:
        raise InputError(
            f"sampling.vllm_python={python} has no vLLM; install it there: {python} -m pip install "
            "vllm"
        )


class ServerProcess:
    """A vLLM server that this process started. It listens on this machine alone.

    Attributes:
        url: where it answers, once `wait` has returned.
    """

    def __init__(self, python: str, model: Path, dtype: str, arguments: Sequence[str]):
        """Start a server of the model in a folder."""
        self._held = socket.socket()  # keeps other programs from the port until the server has it
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # vLLM sets it too
        self._held.bind(("127.0.0.1", 0))
        port = self._held.getsockname()[1]
        if sys.platform != "linux":
            self._held.close()  # elsewhere, the server could not bind it
        self.url, self._python = f"http://127.0.0.1:{port}", python
        self._log = model.parent / "server.log"
        command = [python, "-m", MODULE, "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--dtype", dtype]
        command += ["--logprobs-mode", "processed_logprobs", *arguments]
        environment = DEFAULTS | os.environ | NEEDED
        environment.pop("PYTHONPATH", None)  # of another environment
        with self._log.open("wb") as log:
            # a session of its own: Ctrl-C ends the run after its update, which needs the server
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> float:
        """Wait until it answers; return the seconds that it took."""
        with self._held:
            return self._wait()

    def _wait(self) -> float:
        began = time.monotonic()
        while time.monotonic() - began < LONGEST_START:
            if self._process.poll() is not None:
                raise InputError(f"sampling.vllm_python={self._python}: {self.last_words()}")
            try:
                model_and_version(self.url, "sampling.vllm_python", ONCE)
                return time.monotonic() - began
            except InputError:
                time.sleep(0.5)
        raise InputError(
            f"sampling.vllm_python={self._python}: the server did not answer at {self.url} within "
            f"{LONGEST_START:.0f} seconds"
        )

    def last_words(self, seconds: float = 0.0) -> str:
        """Why it has ended, in one line; empty while it runs.

        Args:
            seconds: in which it may still end.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if "WARNING" not in line and "INFO" not in line]
        telling = re.compile(r"\w*[Ee]rror: .*|Worker proc.* died .*")
        errors = [found[0] for line in lines if (found := telling.search(line))]
        said = f"; it said: {errors[0][:400]}" if errors else ""
        return f"the vLLM server ended with status {self._process.returncode}{said}"

    def stop(self) -> None:
        """End it with all its processes."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
                self._process.wait(timeout=15)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
