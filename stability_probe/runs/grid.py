"""A grid of training runs, and the YAML file that it is read from.

base:               # settings that all runs share, as `TrainConfig` names them
  model: uvit
  steps: 300
grid:               # settings that vary, with their values; every combination is a run
  scheme: [unscaled, cs]
  kappa: [0.5, 0.7] # the number of the schemes that take one, here cs:0.5 and cs:0.7
  seed: [0, 1, 2]
probing:            # how runs are probed, as `RecordConfig` names it
  sensitivity_every: 100
weights: false      # whether trained weights are kept
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from stability_probe.errors import StabilityProbeError
from stability_probe.runs.recording import RecordConfig
from stability_probe.runs.training import TrainConfig

KAPPA = "kappa"
"""An axis that is no field of `TrainConfig`: the number behind the name of a scheme."""
SCALABLE = ("cs", "uniform")
"""The schemes that take their number from the axis `kappa`."""
LONGEST = 200
"""Characters of a run's name; file systems take 255 bytes."""
T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Grid:
    """Training runs, one for every combination of the axes' values.

    Attributes:
        base: settings that all runs share, as `TrainConfig` names them.
        axes: settings that vary, with their values. The axis `kappa` is the number of the schemes
            `cs` and `uniform`; a scheme that takes none of it is in the grid once.
        probing: how the runs are probed, as `RecordConfig` names it.
        weights: whether trained weights are kept, in each run's folder.
        source: what error messages call the grid.

    Raises:
        StabilityProbeError: if a name is unknown, a value of the wrong type or refused by
            `TrainConfig`, an axis empty, or two runs the same.

    >>> grid = Grid({"steps": 10}, {"scheme": ["unscaled", "cs"], "kappa": [0.5, 0.7]})
    >>> [name for name, config in grid.cells()]
    ['scheme=unscaled', 'scheme=cs-0.5', 'scheme=cs-0.7']
    """

    base: Mapping[str, Any]
    axes: Mapping[str, Any]
    probing: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = False
    source: str = "grid"

    def __post_init__(self) -> None:
        if not self.axes:
            raise self._problem("grid", "has no axes; give one, such as seed: [0, 1, 2]")
        both = [name for name in self.base if name in self.axes]
        if both:
            raise self._problem(f"grid.{both[0]}", "is in base as well; take it out of one of them")
        for axis, values in self.axes.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise self._problem(
                    f"grid.{axis}", f"a list of values is needed, got {values!r}; write [{values}]"
                )
            if not values:
                raise self._problem(f"grid.{axis}", "has no values; give some, or leave it out")
        schemes = self.axes.get("scheme", [self.base.get("scheme")])
        if KAPPA in {*self.base, *self.axes} and not any(map(self._takes_kappa, schemes)):
            raise self._problem(
                KAPPA,
                f"no scheme takes it, of {', '.join(map(str, schemes))}; name one as "
                f"{' or '.join(SCALABLE)}, without a number",
            )
        self.record_config()
        self.cells()

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Grid":
        """Read a grid from a YAML file.

        Raises:
            StabilityProbeError: if it cannot be read, or is not a grid.
        """
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            brief = " ".join(str(error).split())
            raise StabilityProbeError(f"{path}: cannot be read as YAML ({brief})") from error
        parts: dict[str, Any] = {"base": {}, "grid": {}, "probing": {}, "weights": False}
        if not isinstance(read, Mapping) or "grid" not in read:
            raise StabilityProbeError(
                f"{path}: a grid is needed, a mapping with the key grid; see docs/sweeps.md"
            )
        for key, value in read.items():
            if key not in parts:
                raise StabilityProbeError(
                    f"{path}: unknown key {key!r}; choose from {', '.join(parts)}"
                )
            kind = "true or false" if key == "weights" else "a mapping"
            if not isinstance(value, bool if key == "weights" else Mapping):
                raise StabilityProbeError(f"{path}: {key}: {kind} is needed, got {value!r}")
            parts[key] = value
        return cls(parts["base"], parts["grid"], parts["probing"], parts["weights"], str(path))

    def cells(self) -> list[tuple[str, TrainConfig]]:
        """Every run's name, fit for a folder, and settings; the last axis varies fastest.

        A name is made of all axes, so that it stays the same where an axis gets more values.
        """
        found: dict[str, TrainConfig] = {}
        for values in itertools.product(*self.axes.values()):
            settings = {**self.base, **dict(zip(self.axes, values, strict=True))}
            unused = KAPPA in self.axes and not self._takes_kappa(settings.get("scheme"))
            if unused and settings[KAPPA] != self.axes[KAPPA][0]:
                continue  # the number changes nothing
            config = self._config(settings)
            name = self._name(config)
            if name in found:
                raise self._problem("grid", f"has the run {name} twice; take one of them out")
            if len(name) > LONGEST:
                raise self._problem("grid", f"a run would be called {name}; use fewer axes")
            found[name] = config
        return list(found.items())

    def values(self, config: TrainConfig) -> dict[str, Any]:
        """What a run of the grid has on every axis; κ is `None` if its scheme takes none of it."""
        scheme, _, number = config.scheme.partition(":")
        if not self._takes_kappa(scheme):
            return {axis: getattr(config, axis, None) for axis in self.axes}
        own = {"scheme": scheme, KAPPA: float(number)}
        return {axis: own.get(axis, getattr(config, axis, None)) for axis in self.axes}

    def record_config(self) -> RecordConfig:
        """How the runs are probed."""
        return self._built(RecordConfig, self.probing, "probing")

    def _config(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The settings of a run, with κ in the scheme's name."""
        settings = dict(settings)
        if KAPPA in settings:
            kappa = self._typed(float, settings.pop(KAPPA), KAPPA)
            if self._takes_kappa(settings.get("scheme")):
                settings["scheme"] = f"{settings['scheme']}:{kappa}"
        return self._built(TrainConfig, settings, "")

    def _takes_kappa(self, scheme: Any) -> bool:
        """Whether a scheme is named without its number, which κ is then."""
        named = self.axes.get("scheme", [self.base.get("scheme")])
        return scheme in SCALABLE and scheme in named and KAPPA in {*self.base, *self.axes}

    def _name(self, config: TrainConfig) -> str:
        """`axis=value` for every axis; κ goes with the scheme."""
        values = {axis: getattr(config, axis) for axis in self.axes if axis != KAPPA}
        if KAPPA in self.axes:
            values = {"scheme": config.scheme, **values}
        return ",".join(f"{axis}={_safe(value)}" for axis, value in values.items())

    def _built(self, cls: type[T], values: Mapping[str, Any], part: str) -> T:
        """A configuration of dataclasses from what YAML has."""
        hints = get_type_hints(cls)
        made = {}
        for name, value in values.items():
            key = f"{part}.{name}" if part else name
            if name not in hints:
                known = [*hints, KAPPA] if cls is TrainConfig else hints
                raise self._problem(key, f"is unknown; choose from {', '.join(known)}")
            made[name] = self._typed(hints[name], value, key)
        try:
            return cls(**made)
        except StabilityProbeError as error:
            text = f"{part}: {error}" if part else f"{error}"
            raise StabilityProbeError(f"{self.source}: {text}") from error

    def _typed(self, hint: Any, value: Any, key: str) -> Any:
        """A value as a field of a type takes it."""
        if isinstance(hint, UnionType):
            if value is None:
                return None
            hint = next(kind for kind in get_args(hint) if kind is not NoneType)
        if isinstance(hint, type) and is_dataclass(hint):
            if isinstance(value, Mapping):
                return self._built(hint, value, key)
            raise self._problem(key, f"a mapping is needed, got {value!r}")
        if get_origin(hint) is tuple:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise self._problem(key, f"a list is needed, got {value!r}")
            return tuple(self._typed(get_args(hint)[0], one, key) for one in value)
        if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with suppress(ValueError):  # YAML takes 1e-3, without a dot, for a text
                value = float(str(value))  # as a text, what is too large is inf
        if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
            raise self._problem(key, f"{_KINDS[hint]} is needed, got {value!r}")
        return value

    def _problem(self, key: str, text: str) -> StabilityProbeError:
        return StabilityProbeError(f"{self.source}: {key}: {text}")


def _safe(value: Any) -> str:
    """A value as part of a file's name.

    >>> _safe("kappa:1,0.5"), _safe(1e-05)
    ('kappa-1-0.5', '1e-05')
    """
    return re.sub(r"[^\w.+-]", "-", str(value))
