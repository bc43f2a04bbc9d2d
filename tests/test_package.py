"""What is installed and what importing it brings: no host and no Triton before the user asks for
one."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import snn_revplugin

ROOT = Path(__file__).parents[1]
HOSTS = "snntorch", "spikingjelly"
HEAVY = (*HOSTS, "triton", "torchvision", "matplotlib", "sklearn", "typer", "rich")
WITH_TRITON = [
    f"snn_revplugin.kernels.{name}" for name in ("coupled", "equations", "jit", "neuron")
]
LIBRARY = [
    each.name
    for each in pkgutil.walk_packages(snn_revplugin.__path__, "snn_revplugin.")
    if not each.name.startswith(("snn_revplugin.adapters.", "snn_revplugin.cli", *WITH_TRITON))
]


def run(program: str, path: Path | None = None) -> str:
    """What a program prints in a fresh Python, with ``path`` before everything else that is
    importable."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without(*names: str) -> str:
    """The beginning of a program in which these packages are not installed."""
    return f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"


class TestImports:
    def test_nothing_is_imported_that_torch_does_not_import(self) -> None:
        printed = run(
            "import sys, torch\n"
            "before = set(sys.modules)\n"
            "import snn_revplugin\n"
            "print(*{each.split('.')[0] for each in set(sys.modules) - before})"
        )
        assert "snn_revplugin" in printed.split()
        assert not set(HEAVY) & set(printed.split())

    def test_the_library_needs_no_host(self) -> None:
        """Every module of it imports where none is installed, and ``convert`` works."""
        run(
            without("triton")
            + "class NotInstalled:\n"
            + "    def find_spec(self, name, path=None, target=None):\n"
            + f"        if name.split('.')[0] in {HOSTS!r}: raise ModuleNotFoundError(name,"
            " name=name)\n"
            + "sys.meta_path.insert(0, NotInstalled())\n"
            + "import importlib, torch, snn_revplugin\n"
            + f"for name in {LIBRARY!r}: importlib.import_module(name)\n"
            + "assert not snn_revplugin.convert(torch.nn.Linear(2, 2)).swapped\n"
        )

    def test_there_is_a_library(self) -> None:
        assert {
            "snn_revplugin.neurons.leaky",
            "snn_revplugin.replay.walk",
            "snn_revplugin.bptt.step",
        } <= set(LIBRARY)

    @pytest.mark.parametrize("host", HOSTS)
    def test_an_adapter_imports_its_own_host_only(self, host: str) -> None:
        (other,) = set(HOSTS) - {host}
        run(without(other) + f"import snn_revplugin.adapters.{host}\nassert sys.modules[{host!r}]")

    @pytest.mark.parametrize("host", HOSTS)
    def test_an_adapter_needs_no_package_of_its_hosts_tools(self, host: str) -> None:
        run(without("nir", "nirtorch", "pandas") + f"import snn_revplugin.adapters.{host}")

    @pytest.mark.parametrize("host", HOSTS)
    def test_a_missing_host_is_named_with_its_extra(self, host: str) -> None:
        printed = run(
            without(host) + "try:\n"
            f"    import snn_revplugin.adapters.{host}\n"
            "except ImportError as error:\n"
            "    print(error, '|', type(error.__cause__).__name__)"
        )
        message, cause = printed.strip().split(" | ")
        assert f"pip install 'snn-revplugin[{host}]'" in message
        assert cause == "ModuleNotFoundError"


class TestPublicNames:
    def test_they_are_what_the_readme_promises(self) -> None:
        promised = {
            "convert",
            "restore",
            "memory_report",
            "explain",
            "check_reversible",
            "use_settings",
            "get_settings",
        }
        assert promised | {"Settings"} <= set(snn_revplugin.__all__)

    @pytest.mark.parametrize("name", snn_revplugin.__all__)
    def test_they_are_there_and_documented(self, name: str) -> None:
        assert getattr(snn_revplugin, name).__doc__

    def test_adapters(self) -> None:
        from snntorch import Leaky
        from spikingjelly.activation_based import neuron

        for host, names in (
            ("snntorch", ["Leaky"]),
            ("spikingjelly", ["IFNode", "LIFNode", "ParametricLIFNode"]),
        ):
            adapter = importlib.import_module(f"snn_revplugin.adapters.{host}")
            for name in names:
                kind = Leaky if host == "snntorch" else getattr(neuron, name)
                ours = getattr(adapter, f"Rev{name}")
                assert issubclass(ours, kind) and ours is not kind
        assert neuron.RevLIFNode is adapter.RevLIFNode


class TestDistribution:
    def test_metadata(self) -> None:
        metadata = importlib.metadata.metadata("snn-revplugin")
        assert metadata["Version"] == snn_revplugin.__version__
        assert set(metadata.get_all("Provides-Extra")) >= {
            "snntorch",
            "spikingjelly",
            "cli",
            "dev",
            "all",
        }
        required = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
        assert {each.split(">")[0].strip() for each in required} == {"torch", "numpy"}

    def test_a_wheel(self, tmp_path: Path) -> None:
        """It holds every module of the package and of the adapters, nothing else, and works where
        it is unpacked."""
        source, out, unpacked = (tmp_path / name for name in ("source", "out", "unpacked"))
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for name in ("snn_revplugin", "adapters"):
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
        if installed("setuptools") >= 77:  # otherwise `build` fetches one
            command.append("--no-isolation")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        expected = {each.relative_to(source) for each in (source / "snn_revplugin").rglob("*.py")}
        expected |= {
            Path("snn_revplugin/adapters") / each.name
            for each in (source / "adapters").glob("*.py")
        }
        assert {each.relative_to(unpacked) for each in unpacked.rglob("*.py")} == expected
        printed = run(
            "import snn_revplugin.adapters.snntorch as a, snn_revplugin.adapters.spikingjelly as"
            " b\nprint(a.__file__, b.__file__)",
            unpacked,
        )
        assert all(Path(each).is_relative_to(unpacked) for each in printed.split())


def installed(package: str) -> int:
    """The major version of an installed package; 0 if there is none."""
    try:
        return int(importlib.metadata.version(package).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0
