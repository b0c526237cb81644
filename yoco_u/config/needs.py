"""Settings that have an effect only beside certain values of another setting."""

from dataclasses import dataclass


@dataclass(frozen=True, init=False)
class Needs:
    """Annotates a setting, as in `Annotated[float, Needs("schedule", "wsd")]`: without that, the setting has no effect.

    Attributes:
        setting: name of another setting of the same config.
        values: those of its values beside which this one has an effect; None for not set.
    """

    setting: str
    values: tuple[object, ...]

    def __init__(self, setting: str, *values: object) -> None:
        object.__setattr__(self, "setting", setting)
        object.__setattr__(self, "values", values)

    def unmet(self, value: object) -> str | None:
        """What is missing, in words, where the other setting has this value; None if nothing is."""
        if value in self.values:
            return None
        if self.values == (None,):
            return f"is for a config without {self.setting}, which is {value}"
        return f"needs {self.setting} {' or '.join(map(str, self.values))}, and {self.setting} is {value}"
