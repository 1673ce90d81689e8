"""Every option that is asked for is in the configuration, or there is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import base, build, kconfig
from lab.cells import KERNELS, Kernel
from lab.errors import LabError

FRAGMENT = """\
# a comment
CONFIG_SMP=y
CONFIG_NR_CPUS=8
CONFIG_CMDLINE="a=b c"
# CONFIG_VT is not set
CONFIG_AIO=n
"""


def test_parse() -> None:
    assert kconfig.parse(FRAGMENT) == {"SMP": "y", "NR_CPUS": "8", "CMDLINE": '"a=b c"', "VT": "n", "AIO": "n"}


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_asks_for(name: str) -> None:
    kernel = KERNELS[name]
    options = kconfig.wanted(kernel)
    assert options[f"ARM64_{kernel.pages}K_PAGES"] == "y"
    assert options[f"ARM64_VA_BITS_{kernel.va}"] == "y"
    assert options["WERROR"] == "y"
    assert ("PROVE_LOCKING" in options) == (kernel.flavour == "debug")


@pytest.fixture
def menu(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "Kconfig").write_text("config OTHER\n\tbool\n\tdepends on NEVER\n\nconfig FREE\n\tbool\n")
    (tmp_path / "sub/Kconfig.extra").write_text(
        "menuconfig KEXEC\n\tbool \"kexec\"\n\tdepends on ARCH_SUPPORTS_KEXEC\n\tdepends on !XIP\n"
        "\thelp\n\t  Text.\n\nif KEXEC\nconfig LATER\n\tbool\n\tdepends on FREE\nendif\n")
    return tmp_path


def test_a_dropped_option_is_named_with_what_it_depends_on(menu: Path) -> None:
    with pytest.raises(LabError) as raised:
        kconfig.require({"KEXEC": "y", "FREE": "y", "GONE": "y", "NR_CPUS": "8"},
                        {"FREE": "y", "NR_CPUS": "4"}, menu, "4k-va48")
    text = str(raised.value)
    assert "4k-va48" in text
    assert "CONFIG_KEXEC: asked for y, got n; depends on (ARCH_SUPPORTS_KEXEC) && (!XIP)" in text
    assert "CONFIG_GONE: asked for y, got n; the base has no such option" in text
    assert "CONFIG_NR_CPUS: asked for 8, got 4" in text
    assert "CONFIG_FREE" not in text


def test_an_option_that_was_to_be_off_and_is_on_is_named(menu: Path) -> None:
    with pytest.raises(LabError, match="CONFIG_FREE: asked for n, got y"):
        kconfig.require({"FREE": "n", "KEXEC": "n"}, {"FREE": "y"}, menu, "4k-va48")


@pytest.mark.timeout(900)
def test_the_real_configuration_drops_nothing_and_says_so_when_it_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = base.source()
    kernel = Kernel(16, 52, flavour="debug", patched=False)
    config = build.configure(kernel, source.tree, tmp_path / "whole")
    assert kconfig.parse(config.read_text())["ARM64_PA_BITS"] == "52"

    real = kconfig.wanted(kernel)
    monkeypatch.setattr(kconfig, "wanted", lambda *_: real | {"DRM_AMDGPU": "y"})
    with pytest.raises(LabError, match="CONFIG_DRM_AMDGPU: asked for y, got n; depends on"):
        build.configure(kernel, source.tree, tmp_path / "dropped")
