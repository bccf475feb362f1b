# SPDX-License-Identifier: Apache-2.0
"""The ``cna`` section: everything that is not understood is refused, with the setting's name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name


def parse(section: Any) -> CnaConfig:
    config = CnaConfig.from_additional_config({"cna": section, "someone_else": object()})
    assert config is not None
    return config


@pytest.mark.parametrize(
    "additional", [None, {}, {"CNA": {}}, {"other": {"circuits": 1}}, [], "cna"]
)
def test_without_the_key_the_engine_is_plain(additional: Any) -> None:
    assert CnaConfig.from_additional_config(additional) is None


def test_an_empty_section_steers_nothing_yet() -> None:
    config = parse({})
    assert dict(config.circuits) == {}
    assert not config.record


def test_every_setting() -> None:
    config = parse(
        {
            "circuits": {"french": Path("folder") / "french.json", "b": "b.json"},
            "max_circuits": 2,
            "max_circuits_per_request": 1,
            "max_multiplier": 5,
            "record": True,
        }
    )
    assert config.circuits == {"french": str(Path("folder") / "french.json"), "b": "b.json"}
    assert (config.max_circuits, config.max_circuits_per_request) == (2, 1)
    assert (config.max_multiplier, config.record) == (5, True)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (None, "'cna'.*object.*NoneType"),
        ([], "'cna'.*object.*list"),
        ("french.json", "'cna'.*object.*str"),
        (True, "'cna'.*object.*bool"),
        ({"circuit": {}}, "unknown key 'circuit'.*circuits"),
        ({"Circuits": {}}, "unknown key 'Circuits'"),
        ({None: 1}, "unknown key None"),
        ({"circuits": None}, "cna.circuits"),
        ({"circuits": ["a.json"]}, "cna.circuits"),
        ({"circuits": "a.json"}, "cna.circuits"),
        ({"circuits": {"a": None}}, r"cna.circuits\['a'\]"),
        ({"circuits": {"a": 3}}, r"cna.circuits\['a'\]"),
        ({"circuits": {"a": {"path": "a.json"}}}, r"cna.circuits\['a'\]"),
        ({"circuits": {"": "a.json"}}, "circuit name ''"),
        ({"circuits": {"x" * 129: "a.json"}}, "circuit name 'x+'"),
        ({"circuits": {"a\nb": "a.json"}}, "circuit name"),
        ({"circuits": {3: "a.json"}}, "circuit name '3'"),
        ({"max_circuits": 0}, "cna.max_circuits "),
        ({"max_circuits": -1}, "cna.max_circuits "),
        ({"max_circuits": 1.0}, "cna.max_circuits "),
        ({"max_circuits": "8"}, "cna.max_circuits "),
        ({"max_circuits": True}, "cna.max_circuits "),
        ({"max_circuits": None}, "cna.max_circuits "),
        ({"max_circuits_per_request": 0}, "cna.max_circuits_per_request "),
        ({"max_circuits_per_request": None}, "cna.max_circuits_per_request "),
        ({"max_circuits_per_request": [2]}, "cna.max_circuits_per_request "),
        ({"max_multiplier": 0}, "cna.max_multiplier "),
        ({"max_multiplier": -2.0}, "cna.max_multiplier "),
        ({"max_multiplier": math.nan}, "cna.max_multiplier "),
        ({"max_multiplier": math.inf}, "cna.max_multiplier "),
        ({"max_multiplier": 1000001}, "cna.max_multiplier "),
        ({"max_multiplier": "10"}, "cna.max_multiplier "),
        ({"max_multiplier": True}, "cna.max_multiplier "),
        ({"max_multiplier": None}, "cna.max_multiplier "),
        ({"record": 1}, "cna.record "),
        ({"record": "true"}, "cna.record "),
        ({"record": None}, "cna.record "),
        ({"max_circuits": 1, "circuits": {"a": "a", "b": "b"}}, "2 circuits.*max_circuits"),
    ],
)
def test_mistakes_are_refused_with_the_setting(section: Any, says: str) -> None:
    with pytest.raises(CnaConfigError, match=says) as refused:
        parse(section)
    assert "\n" not in str(refused.value)


def test_as_many_circuits_as_there_are_rows() -> None:
    config = parse({"max_circuits": 2, "circuits": {"a": "a.json", "b": "b.json"}})
    assert len(config.circuits) == config.max_circuits


def test_the_callers_section_is_not_changed() -> None:
    section = {"circuits": {"a": Path("a.json")}}
    parse(section)
    assert section == {"circuits": {"a": Path("a.json")}}


@pytest.mark.parametrize("name", ["a", "french off", "é/ü-1.0@2", "x" * 128, " "])
def test_names(name: str) -> None:
    check_name(name)
    assert parse({"circuits": {name: "a.json"}}).circuits == {name: "a.json"}


VALUES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | st.integers(), max_size=3)
)
SETTINGS_KEYS = st.sampled_from(
    ["circuits", "max_circuits", "max_circuits_per_request", "max_multiplier", "record", "other"]
)


@given(st.dictionaries(SETTINGS_KEYS, VALUES))
@settings(max_examples=300, deadline=None)
def test_any_section_is_understood_or_refused(section: dict[str, Any]) -> None:
    try:
        config = parse(section)
    except CnaConfigError as error:
        assert "\n" not in str(error)
    else:
        assert "other" not in section
        for name, value in section.items():
            assert getattr(config, name) == value
