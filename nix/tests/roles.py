#!/usr/bin/env python3
"""Runs the units of the VM tests' machines on this one, for where no VM can run: each from its own rendered cluster file and
its own ExecStart, with the credentials that its unit loads and no other secret. Each says READY, and the endpoints answer.

usage: roles.py NIX FLAKE TIGHTWAD LLAMA_CPP [arguments of nix]   (with the evaluation harness, whose YAML is JSON)
"""

import json
import os
import pathlib
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

PATIENCE = 120  # seconds
# Endpoint of each test, with the path of its key.
TESTS = {
    "pool": ("http://127.0.77.1:8080", "/var/lib/secrets/pool"),
    "speculation": ("http://127.0.77.3:8088", "/var/lib/secrets/proxy"),
}
NODES = """nodes: builtins.mapAttrs (_: node: let config = node.config or node; in {
  file = config.services.tightwad.configFile.unchecked.text;
  units = builtins.mapAttrs (_: unit: unit.serviceConfig) (builtins.removeAttrs config.systemd.services
    (builtins.filter (name: builtins.match "tightwad-.*" name == null) (builtins.attrNames config.systemd.services)));
}) nodes"""


def here(text, models):
    """Maps the machines' addresses to loopback, and the store's models to those of the repository."""
    config = json.loads(text.replace("192.168.1.", "127.0.77.").replace("127.0.0.1", "127.0.77.9"))
    for model in config["models"].values():
        name = pathlib.Path(model["path"]).name.split("-tightwad-slow")
        model["path"] = str(models / (name[0] if len(name) == 1 else "tightwad-tiny-target-q8_0.gguf"))
    return json.dumps(config)


class Unit:
    def __init__(self, work, name, service, text, keys, tightwad, llama_cpp):
        self.name, self.folder = name, work / name
        (self.folder / "credentials").mkdir(parents=True)
        for credential in service.get("LoadCredential", []):
            key, path = credential.split(":", 1)
            (self.folder / "credentials" / key).write_text(keys.setdefault(path, secrets.token_hex(16)))
        file = self.folder / "cluster.yaml"
        file.write_text(text)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.folder / "notify"))
        _, _, _, *arguments = shlex.split(service["ExecStart"])
        self.log = open(self.folder / "log", "w")
        state = {f"XDG_{kind}": str(self.folder / kind) for kind in ["STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"]}
        self.process = subprocess.Popen(
            [tightwad, "-c", file, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env={
                "PATH": f"{llama_cpp}/bin",
                "HOME": str(self.folder),
                "CREDENTIALS_DIRECTORY": str(self.folder / "credentials"),
                "NOTIFY_SOCKET": str(self.folder / "notify"),
                **state,
            },
        )

    def ready(self):
        self.socket.settimeout(PATIENCE)
        told = []
        while "READY=1" not in told:
            told = self.socket.recv(4096).decode().splitlines()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "no end within 40 s"


def ask(url, key):
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            request = urllib.request.Request(f"{url}/v1/completions", body, headers)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["choices"][0]["text"]
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def main():
    nix, flake, tightwad, llama_cpp, *arguments = sys.argv[1:]
    models = pathlib.Path(__file__).resolve().parents[2] / "tests/models"
    for test, (url, key) in TESTS.items():
        nodes = f"{flake}#checks.x86_64-linux.{test}.nodes"
        evaluated = subprocess.run([nix, "eval", "--json", nodes, "--apply", NODES, *arguments], capture_output=True)
        if evaluated.returncode != 0:
            sys.exit(f"roles: {test}: {evaluated.stderr.decode()}")
        with tempfile.TemporaryDirectory() as work:
            keys, units = {}, []
            try:
                for node in json.loads(evaluated.stdout).values():
                    for name, service in node["units"].items():
                        text = here(node["file"], models)
                        units.append(Unit(pathlib.Path(work), name, service, text, keys, tightwad, llama_cpp))
                for unit in units:
                    unit.ready()
                text = ask(url, keys[key])
                assert text.strip(), f"{test} answers nothing"
                print(f"roles: {test}: {', '.join(unit.name for unit in units)} are ready and answer {text!r}")
            except Exception:
                for unit in units:
                    print(f"--- {unit.name}\n{(unit.folder / 'log').read_text()}", file=sys.stderr)
                raise
            finally:
                ends = {unit.name: unit.stop() for unit in units}
            assert not any(ends.values()), f"{test}: {ends}"


if __name__ == "__main__":
    main()
