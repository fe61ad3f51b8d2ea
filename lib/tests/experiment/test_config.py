"""Configurations: three layers, strict types, helpful refusals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compendium.experiment.config import PRESETS, ConfigError, configure


@dataclasses.dataclass(frozen=True)
class Example:
    epochs: int = 10
    learning_rate: float = 0.1
    name: str = "flat"
    sizes: tuple[int, ...] = (64,)
    flag: bool = False
    limit: int | None = None


ALL = {preset: {} for preset in PRESETS} | {"smoke": {"epochs": 1}}


def test_overrides_win_over_the_preset_and_the_preset_over_defaults():
    assert configure(Example, ALL, "mini").epochs == 10
    assert configure(Example, ALL, "smoke").epochs == 1
    assert configure(Example, ALL, "smoke", {"epochs": 7}).epochs == 7


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configure(Example, ALL, "mini").epochs = 3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"epoch": 3}, "did you mean 'epochs'?"),
        ({"epochs": "3"}, "field 'epochs' wants int, not '3'"),
        ({"epochs": True}, "field 'epochs' wants int, not True"),
        ({"epochs": 3.5}, "wants int"),
        ({"name": 3}, "wants str"),
        ({"sizes": [1, "2"]}, "field 'sizes' wants tuple[int, ...]"),
        ({"flag": 1}, "wants bool"),
        ({"limit": "none"}, "wants int | None"),
        ({"name": object()}, "wants str"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        configure(Example, ALL, "mini", overrides)
    assert sentence in str(error.value)


def test_a_missing_preset_is_refused():
    with pytest.raises(ConfigError, match="has no preset 'paper'"):
        configure(Example, {"smoke": {}, "mini": {}, "benchmark": {}}, "mini")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(),
            "learning_rate": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
            "name": st.text(),
            "sizes": st.lists(st.integers()),
            "flag": st.booleans(),
            "limit": st.none() | st.integers(),
        },
    )
)
def test_values_of_the_right_type_pass_unchanged(overrides):
    config = configure(Example, ALL, "mini", overrides)
    for name, value in overrides.items():
        assert getattr(config, name) == (tuple(value) if name == "sizes" else value)
