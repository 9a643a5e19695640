"""Which branch, step and generation each forward of a model belongs to, from all that tells something of it."""

from __future__ import annotations

from lite_attention.ops.place import Place

__all__ = ["Clock"]


class Clock:
    """Places the forwards of one generation after another; the transformers of a pipeline share one.

    What a step is, from the surest to the vaguest:

    1. The caller says it (`branch(name, step)`, or diffusers' `cache_context` with a `step_index`).
    2. It ends where the timestep that the model is given changes, or where the scheduler of the pipeline has moved on:
       a solver of second order comes twice to a timestep.
    3. It ends where a named branch runs that has run in it.
    4. Every forward is one.

    Branches are told by their names, or by the order of the forwards that share a timestep. A generation ends where
    somebody says so (`begin`), where the told step or the timestep turns back, and after as many steps as are known.

    Args:
        num_steps: denoising steps of a generation, as the user gave them; None = unknown.
        max_steps: begin anew after so many steps where nothing else tells generations apart.
    """

    def __init__(self, num_steps: int | None = None, max_steps: int | None = None) -> None:
        self.generation = 0
        self.is_told = False  # somebody says, or the timesteps do, where generations begin
        self.is_blind = False  # nothing told the last forward from a step of its own
        self.is_endless = False  # nothing will tell where its generation ends
        self.has_loop = False  # a pipeline has announced its loop
        self.in_loop = False  # the last forward's generation began with it
        self._num_steps, self._max_steps = num_steps, max_steps
        self._total: int | None = None  # steps that the loop has announced
        self._begins, self._loop_begins = True, False
        self._step = 0
        self._ran: set[str | int] = set()  # branches, in this step
        self._timestep: float | None = None
        self._index: int | None = None
        self._direction = 0.0

    def begin(self, *, is_told: bool = True) -> None:
        """Let the next forward begin a generation.

        Args:
            is_told: whoever calls this does so at every generation.
        """
        self._begins = True
        self.is_told |= is_told

    def begin_loop(self, total: int | None = None) -> None:
        """Let the next forward begin the loop of a pipeline, of `total` steps as far as known."""
        self.begin()
        self._total, self.has_loop, self._loop_begins = total, True, True

    def place(
        self, name: str | None = None, step: int | None = None, timestep: float | None = None, index: int | None = None
    ) -> Place:
        """Return where the next forward is.

        Args:
            name: its branch, if told.
            step: its step, if told.
            timestep: that the model is given, in any units; None = it has none.
            index: number of this call, as the scheduler counts those of one branch; None = it does not say.
        """
        self.is_blind = name is None and step is None and timestep is None
        turned = timestep is not None and self._turns(timestep)
        self.is_told |= step is not None or turned
        if self._begins or turned or (step is not None and step < self._step):
            self._begin(step or 0)
        elif step is not None:
            self._go_to(step)
        elif self._is_next_step(name, timestep, index):
            self._go_to(self._step + 1)
            if self._step >= self._limit():
                self._begin(0)
        self._timestep, self._index = timestep, index
        self.is_endless = timestep is None and not self.is_told and self._num_steps is None
        branch = name if name is not None else sum(isinstance(ran, int) for ran in self._ran)
        self._ran.add(branch)
        return Place(branch, self._step, self.generation, step is not None)

    def _begin(self, step: int) -> None:
        self.generation += 1
        self.in_loop = self._loop_begins
        self._begins, self._loop_begins, self._direction = False, False, 0.0
        self._step, self._ran = step, set()

    def _go_to(self, step: int) -> None:
        if step != self._step:
            self._step, self._ran = step, set()

    def _turns(self, timestep: float) -> bool:
        """Note the way that timesteps go, and return whether this one goes against it."""
        if self._begins or self._timestep is None or timestep == self._timestep:
            return False
        way = timestep - self._timestep
        if way * self._direction < 0:
            return True
        self._direction = way
        return False

    def _is_next_step(self, name: str | None, timestep: float | None, index: int | None) -> bool:
        if index is not None and index != self._index:
            return True
        beside_told = name is not None and self._timestep is None  # the last forward told its step
        if timestep is not None and timestep != self._timestep and not beside_told:
            return True
        return name in self._ran if name is not None else timestep is None

    def _limit(self) -> float:
        """Return the steps after which a generation ends by itself."""
        if self._num_steps is not None:
            return self._num_steps
        if self._timestep is not None:
            return float("inf")  # it will turn back
        unknown = None if self.is_told else self._max_steps
        return self._total or unknown or float("inf")
