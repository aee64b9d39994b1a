#!/usr/bin/env python3
"""Runs every role of the template's four hosts on this machine, where no VM can run. Each role uses the file and the ExecStart
of its unit, with the credentials of its unit and no other secret. Each must report READY, and both endpoints must answer.
Addresses become loopback addresses, GPUs become the CPU, and models become those of tests/models; the rest stays as rendered.

usage: roles.py NIX NIXPKGS TIGHTWAD LLAMA_CPP   (NIXPKGS: a stand-in whose YAML is plain JSON text)
"""

import json
import pathlib
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

TIMEOUT = 120  # seconds
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# The rendered files, for a test that needs no Nix.
RENDERED = REPOSITORY / "tests/rendered"
HOSTS = """builtins.mapAttrs (_: host: {
  file = host.config.services.tightwad.configFile.unchecked.text;
  roles = builtins.mapAttrs (role: file: {
    file = file.unchecked.text;
    service = host.config.systemd.services."tightwad-${role}".serviceConfig;
  }) host.config.services.tightwad.roleFiles;
})"""


def hosts(nix, nixpkgs):
    """The hosts of the template, with their files and units."""
    inputs = {"tightwad": f"git+file://{REPOSITORY}", "nixpkgs": f"path:{nixpkgs}", "tightwad/nixpkgs": f"path:{nixpkgs}"}
    command = [nix, "eval", "--json", "--no-write-lock-file", f"path:{REPOSITORY}/nix/template#nixosConfigurations"]
    for name, source in inputs.items():
        command += ["--override-input", name, source]
    evaluated = subprocess.run([*command, "--apply", HOSTS], capture_output=True)
    if evaluated.returncode != 0:
        sys.exit(f"roles: the template does not evaluate:\n{evaluated.stderr.decode()}")
    return json.loads(evaluated.stdout)


def is_rendered(name, text):
    """Whether tests/rendered has what the template renders."""
    file = RENDERED / f"{name}.json"
    assert file.exists() and json.loads(file.read_text()) == json.loads(text), (
        f"{file} is not what the template renders; it should be:\n{text}"
    )


def here(text, small):
    """What of a file has to be different on this machine; `small` is the model of the draft."""
    config = json.loads(text.replace("127.0.0.1", "127.0.77.1").replace("192.168.1.", "127.0.77."))
    for name, model in config.get("models", {}).items():
        file = "tightwad-tiny-draft-f16.gguf" if name == small else "tightwad-tiny-target-q8_0.gguf"
        model |= {"path": str(REPOSITORY / "tests/models" / file), "ctx_size": 1024}
    if "coordinator" in config:
        config["coordinator"] |= {"backend": "cpu", "gpus": []}
    for worker in config.get("workers", []):
        worker |= {"backend": "cpu", "gpus": [{"name": "CPU", "vram_gb": 1}]}
    for section in ["target", "draft"]:
        config.get(section, {}).pop("backend", None)
    for section in {"coordinator", "target", "draft"} & config.keys():
        config[section] |= {"slots": 1, "threads": 1}
    return config


class Unit:
    def __init__(self, folder, service, config, keys, tightwad, llama_cpp):
        self.name, self.folder = folder.name, folder
        (self.folder / "credentials").mkdir(parents=True)
        for credential in service.get("LoadCredential", []):
            key, path = credential.split(":", 1)
            (self.folder / "credentials" / key).write_text(keys.setdefault(path, secrets.token_hex(16)))
        file = self.folder / "cluster.yaml"
        file.write_text(json.dumps(config))
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
        self.socket.settimeout(TIMEOUT)
        messages = []
        while "READY=1" not in messages:
            messages = self.socket.recv(4096).decode().splitlines()

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
    give_up = time.monotonic() + TIMEOUT
    while True:
        try:
            request = urllib.request.Request(f"{url}/v1/completions", body, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)["choices"][0]["text"]
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def main():
    nix, nixpkgs, tightwad, llama_cpp = sys.argv[1:]
    keys, units = {}, []
    with tempfile.TemporaryDirectory() as work:
        try:
            for host in hosts(nix, nixpkgs).values():
                is_rendered("cluster", host["file"])
                small = json.loads(host["file"])["draft"]["model"]
                config = here(host["file"], small)
                for role, part in host["roles"].items():
                    is_rendered(role, part["file"])
                    folder = pathlib.Path(work) / f"tightwad-{role}"
                    own = here(part["file"], small)
                    units.append(Unit(folder, part["service"], own, keys, tightwad, llama_cpp))
            for unit in units:
                unit.ready()
                print(f"roles: {unit.name} is ready")
            for section, key in [("coordinator", "api_key_file"), ("proxy", "auth_token_file")]:
                listener = config[section]
                text = ask(f"http://{listener['host']}:{listener['port']}", keys[listener[key]])
                assert text.strip(), f"the {section} answers nothing"
                print(f"roles: the {section} answers {text!r}")
        except Exception:
            for unit in units:
                print(f"--- {unit.name}\n{(unit.folder / 'log').read_text()}", file=sys.stderr)
            raise
        finally:
            ends = {unit.name: unit.stop() for unit in units}
        assert len(units) == 5, f"not every role of the template is run: {list(ends)}"
        assert not any(ends.values()), f"a unit does not end well: {ends}"


if __name__ == "__main__":
    main()
