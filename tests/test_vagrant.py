"""The Vagrantfile: Ruby evaluates it, and a recorder in place of Vagrant writes down what it asks for.

Where Vagrant itself is installed, it validates the file too; `make vagrant-check` boots the machine.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VAGRANTFILE = ROOT / "vagrant" / "Vagrantfile"
README = ROOT / "README.md"
RECORDER = """
require "json"
class Recorder < BasicObject
  def initialize(told, path = []); @told, @path = told, path; end
  def method_missing(name, *given, **named, &block)
    if name.to_s.end_with?("=")
      @told << [(@path + [name.to_s.chomp("=")]).join("."), given]
    elsif block
      where = @path + [name.to_s, *given.map(&:to_s)]
      block.call(*[::Recorder.new(@told, where), ::Recorder.new(@told, where)].first(block.arity))
    elsif given.empty? && named.empty?
      return ::Recorder.new(@told, @path + [name.to_s])
    else
      @told << [(@path + [name.to_s]).join("."), [*given, named]]
    end
  end
  def respond_to_missing?(*) = true
end
module Vagrant
  def self.configure(version)
    told = []
    yield Recorder.new(told)
    puts JSON.dump(told)
  end
end
load ARGV[0]
"""


@pytest.fixture(scope="module")
def told() -> list[tuple[str, list[Any]]]:
    if not shutil.which("ruby"):
        pytest.skip("no Ruby is installed: apt-get install ruby")
    done = subprocess.run(["ruby", "-W", "-e", RECORDER, VAGRANTFILE], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [(name, given) for name, given in json.loads(done.stdout)]


def test_the_machine_is_a_stock_debian_of_two_processors(told: list[tuple[str, list[Any]]]) -> None:
    settings = {name: given[0] for name, given in told if len(given) == 1}
    assert settings["vm.box"] == "debian/bookworm64"
    for provider in ("libvirt", "virtualbox"):
        assert settings[f"vm.provider.{provider}.cpus"] == 2
        assert settings[f"vm.provider.{provider}.memory"] == 4096


def test_ports_are_forwarded_to_the_loopback_only(told: list[tuple[str, list[Any]]]) -> None:
    ports = [given[1] for name, given in told if name.endswith("vm.network")]
    assert ports
    assert all(each["host_ip"] == "127.0.0.1" and each["guest"] == 10249 and each["id"] == "page" for each in ports)


def test_the_clone_is_copied_without_what_belongs_to_one_machine(told: list[tuple[str, list[Any]]]) -> None:
    folders = {given[1]: (given[0], given[2]) for name, given in told if name == "vm.synced_folder"}
    source, options = folders["/dataplane"]
    assert (VAGRANTFILE.parent / source).resolve() == ROOT
    assert options["type"] == "rsync"
    assert {".git/", ".venv/"} <= set(options["rsync__exclude"])
    assert folders["/vagrant"][1] == {"disabled": True}


def test_what_it_runs_and_recommends_exists(told: list[tuple[str, list[Any]]]) -> None:
    (script,) = [given[1]["inline"] for name, given in told if name == "vm.provision"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    for path in re.findall(r"^/dataplane/(\S+)", script, re.MULTILINE):
        assert os.access(ROOT / path, os.X_OK)
    (message,) = [given[0] for name, given in told if name == "vm.post_up_message"]
    assert len(re.findall(r"^  \S", message, re.MULTILINE)) == 3


@pytest.mark.slow
def test_vagrant_accepts_it(tmp_path: Path) -> None:
    if not shutil.which("vagrant"):
        pytest.skip("Vagrant is not installed")
    done = subprocess.run(
        ["vagrant", "validate"],
        cwd=VAGRANTFILE.parent,
        env={
            **os.environ,
            "VAGRANT_HOME": str(tmp_path),
            "VAGRANT_CHECKPOINT_DISABLE": "1",
            "VAGRANT_DEFAULT_PROVIDER": "libvirt",
            "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
