"""What every strategy is: a spec that expands to phases on a given anatomy."""

from __future__ import annotations

from typing import ClassVar, Literal

from hf_finetune.models.anatomy import Anatomy
from hf_finetune.spec import Spec
from hf_finetune.strategies.methods import AdapterSpec
from hf_finetune.strategies.phase import Phase


class StrategySpec(Spec):
    """A named way to adapt a backbone. A new one is a file beside this and a line in `STRATEGIES`."""

    name: str
    from_scratch: ClassVar[bool] = False
    """The strategy starts from random weights."""
    schedule_scope: ClassVar[Literal["run", "phase"]] = "run"
    """What `schedule.scope: auto` means for it."""

    @property
    def solver_steps(self) -> int:
        """Steps of a run that solvers do alone, one for each phase; 0 where some phase takes gradient steps."""
        return 0

    def steps_of(self, total: int) -> int:
        """Return how many optimizer steps a run takes that is given `total`; called with the solver resolved."""
        return total

    def to_adapter(self) -> AdapterSpec | None:
        """Return the adapters this strategy puts into the backbone; None for none."""
        return None

    def to_phases(self, anatomy: Anatomy) -> list[Phase]:
        """Return the phases this strategy stands for."""
        raise AssertionError(f"{type(self).__name__} defines no phases")
