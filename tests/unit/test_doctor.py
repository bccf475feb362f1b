# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm doctor` without an engine: what it reports, and when it says no."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cna_kernels
from cna_vllm.cli import engine_args, main
from cna_vllm.serving import seams
from cna_vllm.serving.doctor import Check, environment


@pytest.mark.parametrize(
    ("allowed", "holds", "says"),
    [
        (None, True, "not set"),
        ("cna", True, "'cna'"),
        ("other,cna", True, "'other,cna'"),
        ("", False, "does not name cna; add it or unset it"),
        ("other,cna2", False, "does not name cna"),
    ],
)
def test_vllm_plugins(allowed: str | None, holds: bool, says: str) -> None:
    check = environment.plugins_allowed(allowed)
    assert check.holds is holds and says in check.seen


def test_the_kernel_here_passes() -> None:
    check = environment.kernel_check()
    assert check.holds, str(check)
    assert "9 of 9 cases" in check.seen and check.seen.endswith("backend cpu")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, arms: torch.where(arms[:, None] >= 0, out * 1.01, out),
        lambda out, arms: torch.where(arms[:, None] < 0, out * 1.01, out),
        lambda out, arms: out.roll(1, 0),
    ],
    ids=["scales wrongly", "touches plain rows", "other rows"],
)
def test_a_wrong_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    def wrong(x: torch.Tensor, arms: torch.Tensor, *rest: Any) -> torch.Tensor:
        return spoil(cna_kernels.act_and_mul_scaled(x, arms, *rest), arms)

    monkeypatch.setattr(environment, "act_and_mul_scaled", wrong)
    check = environment.kernel_check()
    assert not check.holds
    assert all(name in check.seen for name in ("silu in float32", "gelu_tanh in bfloat16"))


def test_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and printed.count("\nok    ") == 5
    assert f"torch           {torch.__version__}\n" in printed
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["engine"] is None
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["extras"]) == {"demo", "eval"}


def test_what_fails_is_told_and_no_engine_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> None:
        raise AttributeError("InputProcessor has no process_inputs")

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr(seams, "install", gone)
    monkeypatch.setattr(engine_args, "start_engine", pytest.fail)
    assert main(["doctor", "some/model"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  VLLM_PLUGINS" in printed and "does not name cna" in printed
    assert "FAIL  the seams fit this vLLM: AttributeError: InputProcessor" in printed
    assert "FAIL  an engine starts: not tried" in printed


def test_versions_that_are_not_supported() -> None:
    found = {**environment.versions(), "vllm": "0.99.0"}
    checks = environment.environment_checks(found)
    assert "0.99.0; install one of these" in str(checks[0]) and not checks[0].holds
    broken = environment.environment_checks({**found, "vllm": "cannot be imported: OSError: x"})
    assert "OSError: x" in broken[0].seen


def test_an_engine_that_does_not_start_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("layer 0: routed\nexperts")

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(engine_args, "start_engine", refuse)
    assert main(["doctor", "some/model"]) == 1
    assert "RuntimeError: layer 0: routed experts" in capsys.readouterr().out


def test_bad_flags_are_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor", "m", "--dtype", "float3"]) == 2
    assert main(["doctor", "--dtype", "float32"]) == 2
    assert "name a model" in capsys.readouterr().err


def test_a_check_is_one_line() -> None:
    assert str(Check("it works", "yes", True)) == "ok    it works: yes"
    assert str(Check("it works", "no", False)) == "FAIL  it works: no"
