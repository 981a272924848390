"""mlx-lm's command lines over our directories: generate, and a server asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from recorded import CONTINUATIONS

pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")

NAME = "stdlib_jangtq2"
PROMPT, TEXT = next(iter(CONTINUATIONS[NAME].items()))
COMMAND = [sys.executable, "-m", "hadamoe.mlx_lm"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(checkpoint):
    """Address of a server with a quantized cache."""
    port = free_port()
    options = ["--model", str(checkpoint(NAME)), "--port", str(port)]
    process = subprocess.Popen(
        [*COMMAND, "--kv", "hk8v8", "--dtype", "float32", "server", *options]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def ask(url, path, **body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=60)


def test_a_completion(server):
    with ask(server, "/v1/completions", prompt=PROMPT, max_tokens=40) as answer:
        found = json.load(answer)
    assert found["choices"][0]["text"] == TEXT[:40]
    assert found["usage"]["completion_tokens"] == 40


def test_a_stream(server):
    """The second answer to the same prompt begins with the first one's cache."""
    lines = []
    with ask(server, "/v1/completions", prompt=PROMPT, max_tokens=40, stream=True) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                lines.append(json.loads(line.removeprefix(b"data: ")))
    assert "".join(d["choices"][0]["text"] for d in lines) == TEXT[:40]


def test_answers_at_once(server):
    """Four prompts in one running batch; each is answered as it would be alone."""
    prompts = list(CONTINUATIONS[NAME].items())[:4]

    def answer(prompt):
        with ask(server, "/v1/completions", prompt=prompt, max_tokens=60) as found:
            return json.load(found)["choices"][0]["text"]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(answer, [prompt for prompt, _ in prompts]))
    assert [t.lstrip() for t in found] == [text[:60].lstrip() for _, text in prompts]


def test_a_chat(server):
    messages = [{"role": "user", "content": "hi"}]
    with ask(server, "/v1/chat/completions", messages=messages, max_tokens=8) as answer:
        found = json.load(answer)
    assert found["choices"][0]["message"]["content"]


def test_generate(checkpoint):
    options = ["--model", str(checkpoint(NAME)), "--prompt", PROMPT, "--max-tokens", "30"]
    options += ["--ignore-chat-template", "--temp", "0"]
    command = [*COMMAND, "--dtype", "float32", "--resident", "generate", *options]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert TEXT[:30].strip() in out


def test_a_cached_prompt(checkpoint, tmp_path):
    """mlx-lm loads the file before any model: it must know our caches by then."""
    model, file = ["--model", str(checkpoint(NAME))], str(tmp_path / "prompt.safetensors")
    ours = [*COMMAND, "--kv", "hk8v8", "--dtype", "float32"]
    long = (checkpoint("stdlib_bf16") / "heldout.txt").read_text()[:300]
    cache = [*ours, "cache_prompt", *model, "--prompt", long, "--prompt-cache-file", file]
    subprocess.run(cache, capture_output=True, check=True)
    generate = ["generate", "--prompt", "x = ", "--prompt-cache-file", file, "--max-tokens", "9"]
    found = subprocess.run([*ours, *generate], capture_output=True, text=True, check=True)
    assert "Generation: 9 tokens" in found.stdout


def test_a_command_is_needed():
    found = subprocess.run([*COMMAND, "--kv", "hk4v3"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "needs a command of mlx-lm: generate, chat, server" in found.stderr
